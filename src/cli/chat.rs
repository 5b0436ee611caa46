//! `chat`: a dialogue with a model, line by line: from a terminal with line editing and history, or from a pipe. It does
//! not depend on any stage. Read `text.rs` for how a response is made.

use std::fs::File;
use std::io::{BufRead, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::json;

use super::text::{How, Printer, Weights, encode, response};
use crate::error::{counted, exit_code, printable};
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::generate::SamplingParams;
use crate::note;
use crate::run::Model;
use crate::tokenizer::chat_template::Message;

#[derive(Args)]
pub(super) struct Chat {
    #[command(flatten)]
    weights: Weights,
    /// Opens the dialogue as a system message.
    #[arg(long)]
    system: Option<String>,
    /// Sends the text as it is, without a chat template, and keeps no history.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    how: How,
}

const HELP: &str = "\
/help          these lines
/reset         forgets the dialogue, not the system message
/system TEXT   sets the system message; without TEXT, shows it
/save FILE     writes the dialogue as a line of JSON to a new file, a record that [data] reads
/exit          ends the program, as the end of the file (Ctrl-D) does
Ctrl-C         ends a response, not the program
Anything else is sent to the model; the arrow keys edit a line and bring back earlier ones.
";

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked<'l> {
    Nothing,
    Help,
    Reset,
    System(&'l str),
    Save(&'l str),
    Exit,
    /// A word after a slash that is no command.
    Unknown(&'l str),
    Message(&'l str),
}

impl<'l> Asked<'l> {
    fn of(line: &'l str) -> Self {
        let text = line.trim();
        let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        match (word, rest.trim()) {
            ("", _) => Self::Nothing,
            ("/help", _) => Self::Help,
            ("/reset" | "/new", _) => Self::Reset,
            ("/system", text) => Self::System(text),
            ("/save", file) => Self::Save(file),
            ("/exit" | "/quit", _) => Self::Exit,
            // A path such as /etc/hosts is a message.
            (word, _)
                if word.len() > 1 && word.starts_with('/') && word[1..].chars().all(|c| c.is_ascii_lowercase()) =>
            {
                Self::Unknown(word)
            }
            _ => Self::Message(line.trim_end_matches(['\r', '\n'])),
        }
    }
}

/// A line, or why there is none.
enum Read {
    Line(String),
    /// A line that is not UTF-8.
    Unreadable,
    Interrupted,
    End,
}

/// Where the lines come from.
enum Lines {
    Terminal(Box<DefaultEditor>),
    Pipe,
}

impl Lines {
    fn open() -> Result<Self> {
        match std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            true => Ok(Self::Terminal(Box::new(DefaultEditor::new().context("opening the terminal")?))),
            false => Ok(Self::Pipe),
        }
    }

    fn read(&mut self) -> Result<Read> {
        match self {
            Self::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(&line).context("keeping the line")?;
                    Ok(Read::Line(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Read::Interrupted),
                Err(ReadlineError::Eof) => Ok(Read::End),
                Err(error) => Err(error).context("reading the terminal"),
            },
            Self::Pipe => {
                let mut line = vec![];
                let bytes = std::io::stdin().lock().read_until(b'\n', &mut line).context("reading stdin")?;
                match String::from_utf8(line) {
                    _ if bytes == 0 => Ok(Read::End),
                    Ok(line) => Ok(Read::Line(line)),
                    Err(_) => Ok(Read::Unreadable),
                }
            }
        }
    }
}

/// The dialogue so far, and the model that responds.
struct Dialogue<'m> {
    model: &'m Model,
    adapter: Option<&'m Adapter>,
    sampling: SamplingParams,
    messages: Vec<Message>,
    raw: bool,
    /// Prints nothing, for tests.
    quiet: bool,
    seed: u64,
    turns: u64,
}

impl Dialogue<'_> {
    fn system(&self) -> Option<&str> {
        self.messages.first().filter(|first| first.role == "system").map(|first| first.content.as_str())
    }

    fn set_system(&mut self, text: &str) {
        self.messages.retain(|message| message.role != "system");
        self.messages.insert(0, Message::new("system", text));
    }

    fn reset(&mut self) {
        self.messages.retain(|message| message.role == "system");
    }

    /// Sends a message and prints the response; the dialogue is as before if that fails.
    fn send(&mut self, text: &str, stop: &AtomicBool) -> Result<()> {
        self.messages.push(Message::new("user", text));
        match self.respond(text, stop) {
            Ok(text) => {
                self.messages.push(Message::new("assistant", &text));
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn respond(&mut self, text: &str, stop: &AtomicBool) -> Result<String> {
        let tokenizer = self.model.checkpoint.tokenizer();
        let ids = encode(self.model, &self.messages, self.raw.then_some(text))?;
        let mut printer = Printer::new(tokenizer, &self.sampling.stop, self.quiet);
        let (began, seed) = (Instant::now(), self.seed.wrapping_add(self.turns));
        let found = response((self.model, self.adapter), &ids, seed, &self.sampling, &mut printer, stop)?;
        printer.finish()?;
        self.turns += 1;
        let (tokens, seconds) = (found.tokens.len(), began.elapsed().as_secs_f64());
        let stopped = if stop.load(Ordering::Relaxed) { ", stopped" } else { "" };
        note!("({}, {:.1} tokens per second{stopped})", counted(tokens, "token"), tokens as f64 / seconds.max(1e-9));
        Ok(tokenizer.decode(&found.tokens)?.trim().to_owned())
    }

    /// # Errors
    /// If the file is there already, or cannot be written.
    fn save(&self, name: &str) -> Result<()> {
        if name.is_empty() {
            return Err(invalid!("/save needs the name of a new file"));
        }
        let mut file = File::create_new(name).map_err(|error| invalid!("/save {name}: {error}"))?;
        let turn = |message: &Message| json!({ "role": message.role, "content": message.content });
        let turns: Vec<_> = self.messages.iter().map(turn).collect();
        writeln!(file, "{}", json!({ "messages": turns })).with_context(|| format!("writing {name}"))
    }
}

/// A flag that Ctrl-C sets; a second one before it is taken back ends the program.
fn listen() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    #[cfg(unix)]
    {
        use signal_hook::consts::SIGINT;
        use signal_hook::flag::{register, register_conditional_shutdown};
        register_conditional_shutdown(SIGINT, 130, stop.clone()).context("handling signals")?;
        register(SIGINT, stop.clone()).context("handling signals")?;
    }
    Ok(stop)
}

pub(super) fn chat(args: &Chat) -> Result<()> {
    let (model, adapter) = args.weights.open()?;
    let mut dialogue = Dialogue {
        model: &model,
        adapter: adapter.as_ref(),
        sampling: args.how.sampling(&model.checkpoint.tokenizer().ends(None))?,
        messages: args.system.iter().map(|text| Message::new("system", text)).collect(),
        raw: args.raw,
        quiet: false,
        seed: args.how.seed,
        turns: 0,
    };
    let mut lines = Lines::open()?;
    // From a pipe there is nobody to go on with, so Ctrl-C ends the program there.
    let at_terminal = matches!(lines, Lines::Terminal(_));
    let stop = if at_terminal { listen()? } else { Arc::default() };
    note!("Write a message; /help lists the commands, /exit ends.");
    let (mut number, mut failed) = (0, vec![]);
    loop {
        number += 1;
        let line = match lines.read()? {
            Read::Line(line) => line,
            Read::Unreadable => {
                crate::tell!("line {number} is not UTF-8; save the text as UTF-8");
                failed.push(number);
                continue;
            }
            Read::Interrupted => {
                crate::tell!("/exit or Ctrl-D ends");
                continue;
            }
            Read::End => return at_the_end(&failed),
        };
        let done = match Asked::of(&line) {
            Asked::Nothing => Ok(()),
            Asked::Help => {
                crate::report::quiet::print(format_args!("{HELP}"));
                Ok(())
            }
            Asked::Reset => {
                dialogue.reset();
                Ok(())
            }
            Asked::System("") => {
                crate::tell!("{}", dialogue.system().unwrap_or("there is no system message"));
                Ok(())
            }
            Asked::System(text) => {
                dialogue.set_system(text);
                Ok(())
            }
            Asked::Save(file) => dialogue.save(file),
            Asked::Exit => return at_the_end(&failed),
            Asked::Unknown(word) => Err(invalid!("there is no command {word}; /help lists them")),
            Asked::Message(text) => {
                let sent = dialogue.send(text, &stop);
                stop.store(false, Ordering::Relaxed);
                sent
            }
        };
        if let Err(error) = done {
            // A machine that fails will fail again.
            if exit_code(&error) != 2 && !at_terminal {
                return Err(error);
            }
            let line = if at_terminal { String::new() } else { format!("line {number}: ") };
            crate::tell!("{line}{}", printable(&format!("{error:#}")));
            failed.extend((!at_terminal).then_some(number));
        }
    }
}

/// The end of a dialogue from a pipe, whose caller sees the exit code alone.
///
/// # Errors
/// If a line had an error: 2.
fn at_the_end(failed: &[usize]) -> Result<()> {
    match failed {
        [] => Ok(()),
        [first, ..] => Err(invalid!("{} had an error, the first of them line {first}", counted(failed.len(), "line"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::run::embedded;

    #[test]
    fn a_line_is_a_command_or_a_message() {
        assert_eq!(Asked::of("  \n"), Asked::Nothing);
        assert_eq!(Asked::of("/help\n"), Asked::Help);
        assert_eq!((Asked::of("/reset"), Asked::of("/new")), (Asked::Reset, Asked::Reset));
        assert_eq!(Asked::of("/system  Be brief. "), Asked::System("Be brief."));
        assert_eq!(Asked::of("/save a b.jsonl"), Asked::Save("a b.jsonl"));
        assert_eq!(Asked::of("/exit"), Asked::Exit);
        assert_eq!(Asked::of("/hepl"), Asked::Unknown("/hepl"));
        assert_eq!(Asked::of("/etc/hosts is what?\n"), Asked::Message("/etc/hosts is what?"));
        assert_eq!(Asked::of(" a\r\n"), Asked::Message(" a"));
    }

    #[test]
    fn a_response_that_is_stopped_stays_in_the_dialogue_and_the_next_one_is_whole() {
        let model = Model::of(embedded().unwrap()).unwrap();
        let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, max_new_tokens: 12, stop: vec![] };
        let mut dialogue = Dialogue {
            model: &model,
            adapter: None,
            sampling,
            messages: vec![],
            raw: false,
            quiet: true,
            seed: 0,
            turns: 0,
        };
        let words = |dialogue: &Dialogue<'_>| {
            let last = &dialogue.messages.last().unwrap().content;
            model.checkpoint.tokenizer().encode(last, crate::tokenizer::SpecialTokens::None).unwrap().len()
        };
        dialogue.send("How is the hotel?", &AtomicBool::new(true)).unwrap();
        assert_eq!(dialogue.messages.len(), 2);
        let stopped = words(&dialogue);
        dialogue.reset();
        dialogue.send("How is the hotel?", &AtomicBool::new(false)).unwrap();
        assert!(stopped <= 2 && words(&dialogue) > 6, "{stopped} {}", words(&dialogue));
        dialogue.set_system("Be brief.");
        dialogue.reset();
        assert_eq!((dialogue.messages.len(), dialogue.system()), (1, Some("Be brief.")));
        // What does not fit the context leaves the dialogue as it was.
        assert!(dialogue.send(&"word ".repeat(300), &AtomicBool::new(false)).is_err());
        assert_eq!(dialogue.messages.len(), 1);
    }
}
