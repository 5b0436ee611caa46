//! The commands. `--json` puts one object on stdout and nothing else there; people's text goes to stderr, except a
//! generated text and a table that were asked for.

mod bench;
mod chat;
mod completed;
mod completions;
mod data;
mod doctor;
mod help;
mod init;
mod keys;
mod merge;
mod misplaced;
mod plan;
mod probe;
mod report;
mod score;
mod scored;
mod serve;
mod subsets;
mod text;
mod watch;

use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Error, Result};
use clap::{Args, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde_json::Value;

use completed::DeviceValue;

use crate::config;
use crate::config::{DeviceChoice, KvCacheType, Stage};
use crate::device::select::select;
use crate::error::StdoutClosed;
use crate::invalid;
use crate::model_files::inspect;
use crate::note;
use crate::quickstart;
use crate::report::quiet;
use crate::run;
use crate::run::RunOptions;
use crate::train::world::{World, launch};

/// RLHF on one machine: actor, reference, critic and reward model as small adapters over one frozen base.
#[derive(Parser)]
#[command(name = "fourfold", version)]
struct Cli {
    /// Errors and warnings alone on stderr: no progress and no notes.
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Aligns a tiny embedded model from end to end and prints a table that shows it; needs no file and no network.
    Quickstart(Quickstart),
    /// Writes a commented config for a stage over your model and records, which fits your memory and runs as it is.
    Init(init::Init),
    /// Supervised fine-tuning: an adapter from texts or dialogues.
    Sft(Training),
    /// The reward model: an adapter with a scalar head from ranked responses.
    Reward(Training),
    /// DPO: an aligned adapter from comparisons, without a reward model.
    Dpo(Training),
    /// KTO: an aligned adapter from responses labelled desirable or undesirable, without a reward model.
    Kto(Training),
    /// Distillation: an adapter that learns a teacher's whole distribution on responses that it samples itself.
    Distill(Training),
    /// PPO: an aligned adapter from prompts and a reward adapter.
    Ppo(Training),
    /// GRPO: an aligned adapter from prompts and a reward, by comparing the responses to each prompt; no critic.
    Grpo(Training),
    /// RLOO: the same with the mean of the other responses as the baseline.
    Rloo(Training),
    /// What a stage would train on: counts, lengths, what is dropped and why, examples with the loss mask in colour.
    Data(data::Show),
    /// The memory of a stage, phase by phase, computed from shapes without loading weights; and the change that makes it fit.
    Plan(plan::Arguments),
    /// Measures this program on this machine.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Whether a card can be used: driver, libraries, memory, and every kernel against the CPU. Exit code 0 if it can.
    Doctor(doctor::Doctor),
    /// Base + adapter -> what other programs open: a merged model, a classifier, GGUF, GGUF-LoRA; compared with base +
    /// adapter before it gets its name.
    Merge(merge::Merge),
    /// Generates a response to one prompt.
    Generate(text::Generate),
    /// A dialogue with a model in the terminal.
    Chat(chat::Chat),
    /// An HTTP server over a base and adapters that speaks OpenAI's and vLLM's requests: text, log-probabilities, scores.
    Serve(serve::Serve),
    /// Rewards of the responses in a data file, record by record, and the accuracy over its comparisons.
    Score(score::Score),
    /// Log-probabilities of given token ids.
    Logprobs(probe::Logprobs),
    /// The page of a run, or of several runs side by side, from the files in their folders.
    Report(report::Report),
    /// A run that another process trains, in the terminal: state, curves, pace, memory, warnings and samples.
    Watch(watch::Watch),
    /// Every key of a config: meaning, default, unit, range, values.
    Keys(keys::Keys),
    /// A script by which a shell completes commands and options.
    Completions(completions::Completions),
    /// The manual pages.
    Man(completions::Manual),
    /// What a model, an adapter, a GGUF file or the folder of a run holds.
    Inspect {
        /// A model directory, an adapter directory, a .gguf file or the folder of a run.
        path: PathBuf,
        /// One JSON object on stdout.
        #[arg(long)]
        json: bool,
    },
}

/// Where a command computes.
#[derive(Args)]
struct OnDevice {
    /// Where the base lies and passes run: auto (a card if one can be used, else the CPU), cpu, cuda, cuda:N; emulated is
    /// for tests.
    #[arg(long, value_name = "DEVICE", value_parser = DeviceValue, hide_possible_values = true)]
    device: Option<DeviceChoice>,
}

/// How a command that generates keeps keys and values.
#[derive(Args)]
struct KvCache {
    /// What keys and values are kept as on a card: auto is the type of the products, q8_0 takes 34/64 of f16's memory and moves
    /// log-probabilities of sampled tokens by some 0.003 nats.
    #[arg(long, value_name = "TYPE", value_enum)]
    kv_cache_type: Option<WrittenKvCacheType>,
}

#[derive(Clone, Copy, ValueEnum)]
enum WrittenKvCacheType {
    Auto,
    #[value(name = "q8_0", alias = "q8-0")]
    Q8,
}

impl KvCache {
    fn kind(&self) -> Option<KvCacheType> {
        self.kv_cache_type.map(|written| match written {
            WrittenKvCacheType::Auto => KvCacheType::Auto,
            WrittenKvCacheType::Q8 => KvCacheType::Q8_0,
        })
    }
}

#[derive(Args)]
struct Quickstart {
    /// Where adapters, merged model and metrics go.
    #[arg(long, default_value = "runs/quickstart")]
    out: PathBuf,
    /// Seed of data, initial adapters and sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    on: OnDevice,
    /// Replaces a quickstart of another seed or machine in the folder; the same one is simply made again.
    #[arg(long)]
    overwrite: bool,
    /// One JSON object on stdout instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Training {
    /// The TOML file; `fourfold init` writes one, and configs/ has recipes.
    config: PathBuf,
    /// Changes one key: --set ppo.kl_coef=0.1
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    on: OnDevice,
    /// Where adapters and metrics go; else the config's output_dir.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Continues from a checkpoint of this run: a directory, or the newest one that is complete.
    #[arg(long, value_name = "DIR|latest", num_args = 0..=1, default_missing_value = "latest")]
    resume: Option<PathBuf>,
    /// Resumes although settings changed that change the mathematics.
    #[arg(long, requires = "resume")]
    force: bool,
    /// With --resume: begins at step 0 where the folder has no checkpoint.
    #[arg(long, requires = "resume")]
    from_start: bool,
    /// Starts anew although the folder holds a run, finished or not, whose files are removed after the first step.
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

/// Parses the arguments and runs the command.
///
/// # Errors
/// What the command returns; `error::exit_code` says what it means.
pub fn run() -> Result<()> {
    let parsed = help::command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let parsed = parsed.unwrap_or_else(|error| misplaced::exit(&error, std::env::args().skip(1)));
    quiet::set(parsed.quiet);
    match parsed.command {
        Command::Quickstart(args) => {
            launch::alone("quickstart")?;
            if !args.overwrite {
                quickstart::check_free(&args.out, args.seed, args.on.device)?;
            }
            let outcome = quickstart::run_on(&args.out, args.seed, args.on.device);
            let outcome = outcome.inspect_err(|error| show_stopped(args.json, "quickstart", &args.out, error))?;
            match args.json {
                true => print_json(&outcome.to_json()),
                false => say(&format!("{}\n", outcome.table())),
            }
        }
        Command::Init(args) => init::run(&args),
        Command::Sft(args) => train(Stage::Sft, &args),
        Command::Reward(args) => train(Stage::Reward, &args),
        Command::Dpo(args) => train(Stage::Dpo, &args),
        Command::Kto(args) => train(Stage::Kto, &args),
        Command::Distill(args) => train(Stage::Distill, &args),
        Command::Ppo(args) => train(Stage::Ppo, &args),
        Command::Grpo(args) => train(Stage::Grpo, &args),
        Command::Rloo(args) => train(Stage::Rloo, &args),
        Command::Data(args) => data::show(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Merge(args) => merge::merge(args),
        Command::Generate(args) => text::generate(&args),
        Command::Chat(args) => chat::chat(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Score(args) => score::score(&args),
        Command::Logprobs(args) => probe::logprobs(&args),
        Command::Report(args) => report::report(&args),
        Command::Watch(args) => watch::run(&args),
        Command::Keys(args) => keys::run(&args),
        Command::Completions(args) => completions::completions(&args),
        Command::Man(args) => completions::manual(&args),
        Command::Inspect { path, json } => {
            if let Some(run) = run::describe(&path)? {
                return if json { print_json(&run) } else { say(&inspect::render(&run)) };
            }
            run::check_described(&path)?;
            let mut found = inspect::inspect(&path)?;
            let selected = select(DeviceChoice::Auto)?;
            let why = selected.reason.as_deref().map(run::placement::in_short);
            let why = why.map(|why| format!(" ({why}; `fourfold doctor` says more)")).unwrap_or_default();
            found["device"] = format!("{}{why}", selected.name()).into();
            match json {
                true => print_json(&found),
                false => say(&inspect::render(&found)),
            }
        }
    }
}

/// Writes to stdout at once; a closed pipe is an error here, where `print!` would panic.
fn say(text: &str) -> Result<()> {
    say_with(|out| out.write_all(text.as_bytes()))
}

/// The same for text that is written piece by piece.
fn say_with(write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    write(&mut out).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Error::new(StdoutClosed),
        _ => Error::new(error).context("writing to stdout"),
    })
}

/// Refuses a file whose folder is not there, before anything is computed for it. (Commands that write a folder make those above
/// it.)
fn check_folder_of(out: &Path) -> Result<()> {
    match out.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        Some(folder) if folder.exists() => {
            Err(invalid!("--out {}: {} is a file, not a folder; name another", out.display(), folder.display()))
        }
        Some(folder) => {
            Err(invalid!("--out {}: there is no folder {}; make it first", out.display(), folder.display()))
        }
        None => Ok(()),
    }
}

fn print_json(value: &Value) -> Result<()> {
    say(&format!("{value}\n"))
}

/// Prints the one object of `--json` of a command that was stopped on request; its error is printed as any other.
fn show_stopped(json: bool, stage: &str, out: &Path, error: &Error) {
    if let Some(stopped) = run::stopped(stage, out, error).filter(|_| json) {
        // The pipe may be closed by the same Ctrl-C; the error that is returned says what happened.
        let _ = print_json(&stopped);
    }
}

fn train(stage: Stage, args: &Training) -> Result<()> {
    let world = match stage {
        Stage::Distill => {
            launch::alone(stage.name())?;
            World::default()
        }
        _ => launch::world(stage.name())?,
    };
    if !world.is_first() {
        quiet::mute();
    }
    let config = config::load(&args.config, &args.set)?.on(args.on.device);
    let out = args.out.clone().unwrap_or_else(|| config.output_dir(stage));
    let launch = RunOptions {
        resume: args.resume.clone(),
        force: args.force,
        from_start: args.from_start,
        overwrite: args.overwrite,
        command: match world.is_alone() {
            true => run::resuming_command(std::env::args()),
            false => format!("mpirun -n {} {}", world.size(), run::resuming_command(std::env::args())),
        },
        world: world.clone(),
    };
    let summary = run::stage(stage, &config, &out, &launch);
    let json = args.json && world.is_first();
    let summary = summary.inspect_err(|error| show_stopped(json, stage.name(), &out, error))?;
    if !world.is_first() {
        return Ok(());
    }
    if args.json {
        return print_json(&summary);
    }
    note!("{}: done; everything is in {}", stage.name(), out.display());
    Ok(())
}
