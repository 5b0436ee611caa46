//! A run's output folder: which command it belongs to, who may write there, and which files of an earlier run are
//! removed.
//!
//! It does not depend on a stage or a model.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result};
use serde_json::{Value, json};

pub(super) use crate::config::RESOLVED;
use crate::config::{MOST_MEMBERS, RUN_FILES as FILES, mark};
use crate::error::Interrupted;
use crate::host::date::utc_of;
use crate::invalid;
use crate::report::events_of;
use crate::train::former;
use crate::train::former::{Former, move_into};
use crate::train::lock;
use crate::train::lock::Lock;
use crate::train::store::Store;

/// What `--json` prints, written when a run is finished.
pub(super) const SUMMARY: &str = FILES[0];
/// What llama.cpp's server writes.
pub(super) const SERVER_LOG: &str = "llama-server.log";
/// Where a run's checkpoints lie.
pub(super) const CHECKPOINTS: &str = "checkpoints";
/// What an adapter's folder holds.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The adapters of a reward run: of one model, or of an ensemble's members.
pub const MEMBERS: [&str; MOST_MEMBERS] = [
    "adapter",
    "adapter_1",
    "adapter_2",
    "adapter_3",
    "adapter_4",
    "adapter_5",
    "adapter_6",
    "adapter_7",
    "adapter_8",
    "adapter_9",
    "adapter_10",
    "adapter_11",
    "adapter_12",
    "adapter_13",
    "adapter_14",
    "adapter_15",
];

/// The adapters' folders that a command writes.
pub(super) fn adapters_of(by: &str) -> &'static [&'static str] {
    match by {
        "quickstart" => &["sft", "reward", "actor", "critic"],
        "ppo" => &["actor", "critic", "actor_ema"],
        "grpo" | "rloo" => &["actor"],
        "reward" => &MEMBERS,
        _ => &["adapter"],
    }
}

/// Refuses the name of what a run in the folder writes: an output of that name would end the run when it comes to write it.
///
/// # Errors
/// If the path is one of its adapters' or its checkpoints'.
pub fn check_not_of_run(out: &Path) -> Result<()> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = out.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match stage_of(folder) {
        Some(stage) if adapters_of(stage).contains(&name) || name == CHECKPOINTS => Err(invalid!(
            "--out {}: the run in {} writes {name} itself; name another --out",
            out.display(),
            folder.display()
        )),
        _ => Ok(()),
    }
}

/// What config.toml holds.
fn resolved(by: &str, settings: &str) -> String {
    format!("{}\n{settings}", mark(by))
}

/// Checks that `out` can be written to by the command `by`: it is new, empty, or the folder of a former run of that
/// very command. Nothing is touched.
///
/// # Errors
/// If there is something else under that name: another's files, or what another stage made.
pub fn check_output(out: &Path, by: &str) -> Result<()> {
    check_not_of_run(out)?;
    if let Some(file) = out.ancestors().skip(1).find(|above| above.is_file()) {
        return Err(invalid!(
            "{}: {} is a file, not a folder; name another folder with --out",
            out.display(),
            file.display()
        ));
    }
    let empty = out.is_dir() && fs::read_dir(out).is_ok_and(|mut entries| entries.all(|e| is_lock(&e)));
    if !out.exists() || empty {
        return Ok(());
    }
    Err(match stage_of(out) {
        Some(stage) if stage == by => return Ok(()),
        Some(other) => invalid!("{} holds a run of `fourfold {other}`; name another folder with --out", out.display()),
        None => {
            invalid!("{} exists and is no folder of a former run; name another with --out, or remove it", out.display())
        }
    })
}

/// The command whose run's folder `dir` is.
pub(super) fn stage_of(dir: &Path) -> Option<&'static str> {
    let settings = fs::read_to_string(dir.join(RESOLVED)).ok()?;
    let first = settings.lines().next()?;
    ["sft", "reward", "dpo", "kto", "distill", "ppo", "grpo", "rloo", "quickstart"]
        .into_iter()
        .find(|by| first == mark(by))
}

/// The base of the run in `dir`: the reward model's for a reward run.
pub(super) fn base_of(dir: &Path) -> Option<String> {
    let settings: toml::Table = fs::read_to_string(dir.join(RESOLVED)).ok()?.parse().ok()?;
    let reward = settings.get("reward_base").filter(|_| stage_of(dir) == Some("reward"));
    Some(reward.or(settings.get("base"))?.get("path")?.as_str()?.to_owned())
}

/// A run that was killed between taking the folder and writing config.toml leaves its lock alone.
fn is_lock(entry: &std::io::Result<fs::DirEntry>) -> bool {
    entry.as_ref().is_ok_and(|e| e.file_name() == crate::train::lock::NAME)
}

/// Refuses to begin anew where the command `by` left a run that is finished, or one that could be resumed. A run that
/// ended before its first checkpoint left nothing to keep.
///
/// # Errors
/// If there is one.
pub fn check_free(out: &Path, by: &str) -> Result<()> {
    let has_adapter = |name: &&str| out.join(name).join(ADAPTER_FILES[1]).exists();
    let is_finished = out.join(SUMMARY).exists();
    if !is_finished && has_checkpoint(out) {
        return Err(invalid!(
            "{} holds a run that is not finished; go on with --resume, name another folder with --out, or lose it with \
             --overwrite",
            out.display()
        ));
    }
    if !is_finished && !adapters_of(by).iter().any(has_adapter) {
        return Ok(());
    }
    let when = fs::metadata(out.join(if is_finished { SUMMARY } else { RESOLVED })).and_then(|about| about.modified());
    Err(invalid!(
        "{} holds a finished run of `fourfold {by}`{}; name another folder with --out, or replace it with --overwrite",
        out.display(),
        when.map_or_else(|_| String::new(), |when| format!(" of {}", utc_of(when)))
    ))
}

/// Refuses an input that [`begin`] would remove, which a run that begins anew in its own start's folder would lose.
///
/// # Errors
/// If one of `inputs`, paths with the keys that name them, lies there.
pub(super) fn check_inputs(out: &Path, by: &str, inputs: &[(String, PathBuf)]) -> Result<()> {
    let removed: Vec<PathBuf> = adapters_of(by)
        .iter()
        .chain(&[CHECKPOINTS])
        .chain(&FILES)
        .filter_map(|name| fs::canonicalize(out.join(name)).ok())
        .collect();
    if removed.is_empty() {
        return Ok(());
    }
    let is_removed = |path: &PathBuf| {
        fs::canonicalize(path).is_ok_and(|path| removed.iter().any(|removed| path.starts_with(removed)))
    };
    match inputs.iter().find(|(key, path)| reached(key, path).iter().any(is_removed)) {
        Some((key, path)) => Err(invalid!(
            "{key} = \"{}\" is a part of the run in {}, which this run would replace; name another folder with --out",
            path.display(),
            out.display()
        )),
        None => Ok(()),
    }
}

/// What is read of the path of a key: itself, an adapter's files, and for data what matches a pattern and the files of folders.
/// Any of it may be a link.
fn reached(key: &str, path: &Path) -> Vec<PathBuf> {
    let mut all = vec![path.to_path_buf()];
    if key.contains("adapter") {
        all.extend(ADAPTER_FILES.map(|file| path.join(file)));
    }
    if key.contains("[data") || key.contains("ptx") {
        let matching = path.to_str().filter(|_| !path.exists()).and_then(|pattern| glob::glob(pattern).ok());
        all.extend(matching.into_iter().flatten().flatten());
        let mut at = 0;
        while at < all.len() {
            // A link to a folder above it would have no end.
            let folder = fs::read_dir(&all[at]).ok().filter(|_| at == 0 || !all[at].is_symlink());
            let within: Vec<PathBuf> = folder.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            all.extend(within);
            at += 1;
        }
    }
    all
}

/// Whether `out` holds a checkpoint, complete or not.
pub(super) fn has_checkpoint(out: &Path) -> bool {
    !Store::at(out.join(CHECKPOINTS)).is_empty()
}

/// Makes the output folder, or takes one that [`check_output`] allows.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be made.
pub(super) fn make(out: &Path, by: &str) -> Result<()> {
    check_output(out, by)?;
    fs::create_dir_all(out).map_err(|e| invalid!("{}: {e}; name another folder with --out", out.display()))
}

/// Writes what `--json` prints of a finished run; by this file the run is known as finished.
///
/// # Errors
/// If the folder cannot be written to.
pub fn write_summary(out: &Path, summary: &Value) -> Result<()> {
    let path = out.join(SUMMARY);
    fs::write(&path, format!("{summary}\n")).with_context(|| format!("writing {}", path.display()))
}

/// The files of the adapters that a finished run's summary names and that its folder lacks, in the order of the adapters. Names
/// count and not whole paths: a folder may have been moved since.
pub(super) fn missing(out: &Path, by: &str, summary: &Value) -> Vec<PathBuf> {
    let values = summary.as_object().into_iter().flat_map(|summary| summary.values());
    let texts = values.flat_map(|value| value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice));
    let named: Vec<&str> = texts.filter_map(|text| Path::new(text.as_str()?).file_name()?.to_str()).collect();
    let written = adapters_of(by).iter().filter(|name| named.contains(name));
    let files = written.flat_map(|name| ADAPTER_FILES.map(|file| out.join(name).join(file)));
    files.filter(|file| !file.is_file()).collect()
}

/// The object of `--json` of a run that was stopped on request; `None` for any other error.
pub fn stopped(by: &str, out: &Path, error: &Error) -> Option<Value> {
    let text = error.chain().find_map(|cause| cause.downcast_ref::<Interrupted>())?.to_string();
    let (message, resume) = match text.split_once(". To go on:\n") {
        Some((message, command)) => (message.to_owned(), Some(command.trim())),
        None => (text, None),
    };
    Some(json!({
        "stage": by, "status": "stopped", "message": message, "resume": resume, "output_dir": out.display().to_string(),
    }))
}

/// Removes the files that a former run of the same command left in a folder, so that no adapter stands beside a config
/// that it was not trained by, and writes the resolved config into it. Whatever else lies there stays, folders of the
/// same names with other files in them included.
///
/// # Errors
/// If the folder cannot be written to.
pub(super) fn begin(out: &Path, by: &str, settings: &str) -> Result<()> {
    clear(out, by)?;
    go_on(out, by, settings)
}

/// As [`begin`]; but where the former run left anything that a command would miss, its files wait until this one has made a step.
///
/// # Errors
/// If the folder cannot be written to.
pub(super) fn begin_in_place(out: &Path, by: &str, settings: &str) -> Result<Option<Former>> {
    let has_metrics = fs::metadata(out.join(FILES[1])).is_ok_and(|about| about.len() > 0);
    let former = match has_metrics || check_free(out, by).is_err() {
        true => Some(Former::set_aside(out, &of_run(out, by)?, &[])?),
        false => None,
    };
    begin(out, by, settings)?;
    Ok(former)
}

/// As [`go_on`] from a checkpoint that is not the end of the run in the folder: what came after it, which this run replaces, waits
/// until it has made a step.
///
/// # Errors
/// If the folder cannot be written to.
pub(super) fn go_on_from(checkpoint: &Path, out: &Path, by: &str, settings: &str) -> Result<Option<Former>> {
    let later = Store::at(out.join(CHECKPOINTS)).after(Some(checkpoint))?;
    let former = match later.is_empty() && !out.join(SUMMARY).exists() {
        true => None,
        false => {
            let mut moved: Vec<PathBuf> = within(out, &later);
            moved.push(SUMMARY.into());
            let copied = FILES[1..].iter().chain(&[RESOLVED]).map(PathBuf::from).chain(events_of(out));
            Some(Former::set_aside(out, &moved, &copied.collect::<Vec<_>>())?)
        }
    };
    go_on(out, by, settings)?;
    Ok(former)
}

/// All that a command wrote into the folder of its run, named relative to it.
fn of_run(out: &Path, by: &str) -> Result<Vec<PathBuf>> {
    let adapters = adapters_of(by).iter().flat_map(|name| ADAPTER_FILES.map(|file| Path::new(name).join(file)));
    let files = FILES.iter().chain(&[RESOLVED, SERVER_LOG]).map(PathBuf::from);
    let checkpoints = within(out, &Store::at(out.join(CHECKPOINTS)).after(None)?);
    Ok(files.chain(adapters).chain(checkpoints).chain(events_of(out)).collect())
}

fn within(out: &Path, paths: &[PathBuf]) -> Vec<PathBuf> {
    paths.iter().filter_map(|path| Some(path.strip_prefix(out).ok()?.to_path_buf())).collect()
}

/// Puts back what waits in a folder whose run ended, or was killed, before its first step, and says so.
///
/// # Errors
/// If a process uses the folder, or a file cannot be moved.
pub(super) fn put_back(out: &Path) -> Result<()> {
    if !former::is_left(out) {
        return Ok(());
    }
    let _lock = lock::lock(out)?;
    let waits = out.join(former::NAME).exists();
    former::put_back(out, || {
        for name in FILES.iter().chain(&[RESOLVED]).map(|name| out.join(name)).filter(|path| path.exists()) {
            fs::remove_file(&name).with_context(|| format!("removing {}", name.display()))?;
        }
        crate::report::remove_events(out)
    })?;
    if waits {
        crate::tell!(
            "{}: a run ended here before its first step; what it would have replaced is there again",
            out.display()
        );
    }
    Ok(())
}

/// Removes what a run that was refused before its first step has written, and its folder if `is_new`, that is if the run made
/// it. Whatever else lies there stays.
///
/// # Errors
/// If a file cannot be removed.
pub(super) fn undo(out: &Path, by: &str, is_new: bool) -> Result<()> {
    clear(out, by)?;
    crate::report::remove_events(out)?;
    for name in [RESOLVED, SERVER_LOG] {
        let _ = fs::remove_file(out.join(name));
    }
    if is_new {
        let _ = fs::remove_file(out.join(lock::NAME));
        let _ = fs::remove_dir(out); // fails, rightly, where something is left in it
    }
    Ok(())
}

/// Removes what [`begin`] removes.
fn clear(out: &Path, by: &str) -> Result<()> {
    let adapters = adapters_of(by).iter().flat_map(|name| ADAPTER_FILES.map(|file| out.join(name).join(file)));
    for path in FILES.map(|name| out.join(name)).into_iter().chain(adapters) {
        match fs::remove_file(&path) {
            Err(e) if ![ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => {
                return Err(e).with_context(|| format!("removing {} of the run before", path.display()));
            }
            _ => {}
        }
    }
    let empty = adapters_of(by).iter().chain(&[CHECKPOINTS]);
    Store::at(out.join(CHECKPOINTS)).clear()?;
    empty.for_each(|name| drop(fs::remove_dir(out.join(name)))); // fails, rightly, where something is left in it
    Ok(())
}

/// Where [`replaced`] makes a run that takes a finished one's place.
const NEW: &str = ".new";

/// Has `make` make a run of the command `by` in a folder of its own inside `out`, whose finished run stays whole until the new
/// one is; then the new one's files take its place. `whole` are folders that belong to the command as a whole. Whatever else
/// lies in `out` stays, and all of it if `make` fails.
///
/// # Errors
/// Those of `make`; if `out` is in use or cannot be written to.
pub fn replaced<T>(out: &Path, by: &str, whole: &[&str], make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    check_output(out, by)?;
    let _lock = lock::lock(out)?;
    let new = out.join(NEW);
    let remove = || match fs::remove_dir_all(&new) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).with_context(|| format!("removing {}", new.display())),
        _ => Ok(()),
    };
    remove()?; // left by a run that was killed
    let made = match make(&new) {
        Ok(made) => made,
        Err(error) => {
            // The error of `make` counts.
            let _ = remove();
            return Err(error);
        }
    };
    clear(out, by)?;
    crate::report::remove_events(out)?;
    for folder in whole.iter().map(|name| out.join(name)).filter(|folder| folder.exists()) {
        fs::remove_dir_all(&folder).with_context(|| format!("replacing {}", folder.display()))?;
    }
    move_into(&new, out).with_context(|| format!("moving {} to {}", new.display(), out.display()))?;
    remove()?;
    Ok(made)
}

/// Writes the resolved config of a run that goes on; it is not finished any more.
///
/// # Errors
/// If the folder cannot be written to.
pub(super) fn go_on(out: &Path, by: &str, settings: &str) -> Result<()> {
    let _ = fs::remove_file(out.join(SUMMARY));
    let (path, new) = (out.join(RESOLVED), out.join(format!("{RESOLVED}.new")));
    // By a rename: the file by which the folder is known is never half there.
    fs::write(&new, resolved(by, settings))
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|e| invalid!("{}: {e}; name another folder with --out", path.display()))
}

/// Is `out` the folder of a run by that command with those settings?
pub fn is_of(out: &Path, by: &str, settings: &str) -> bool {
    fs::read_to_string(out.join(RESOLVED)).is_ok_and(|text| text == resolved(by, settings))
}

/// Makes the output folder, or takes one that [`check_output`] allows and clears it, and writes the resolved config.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be written to.
pub fn prepare_output(out: &Path, by: &str, settings: &str) -> Result<Lock> {
    make(out, by)?;
    let lock = lock::lock(out)?;
    begin(out, by, settings)?;
    Ok(lock)
}

/// Whether a file is the settings of a run, by which its folder is known.
pub fn is_settings(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name == RESOLVED) && file.parent().and_then(stage_of).is_some()
}

/// The resolved settings of the run that an adapter's folder lies in, if it lies in one.
pub fn settings_beside(adapter: &Path) -> Option<String> {
    let settings = fs::read_to_string(adapter.parent()?.join(RESOLVED)).ok()?;
    settings.starts_with("# fourfold ").then_some(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_run_stays_whole_until_its_replacement_is() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        drop(prepare_output(out, "quickstart", "seed = 1").unwrap());
        let write = |root: &Path, name: &str, text: &str| {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), text).unwrap();
        };
        let old = ["summary.json", "actor/adapter_model.safetensors", "merged/old.safetensors", "tb/notes", "notes"];
        old.iter().for_each(|name| write(out, name, "old"));
        let read = |name: &str| fs::read_to_string(out.join(name)).ok();
        let make = |new: &Path| {
            let _lock = prepare_output(new, "quickstart", "seed = 2")?;
            for name in ["summary.json", "actor/adapter_model.safetensors", "merged/new.safetensors", "tb/events"] {
                write(new, name, "new");
            }
            Ok(())
        };
        let failed: Result<()> = replaced(out, "quickstart", &["merged"], |new| {
            make(new)?;
            assert!(old.iter().all(|name| read(name).as_deref() == Some("old")), "while it is made");
            assert!(lock::lock(out).is_err(), "nobody else may begin there");
            Err(invalid!("stopped"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "stopped");
        assert!(old.iter().all(|name| read(name).as_deref() == Some("old")) && !out.join(NEW).exists());
        // One that was killed left its folder.
        write(out, ".new/half", "x");
        replaced(out, "quickstart", &["merged"], make).unwrap();
        for name in ["summary.json", "actor/adapter_model.safetensors", "merged/new.safetensors", "tb/events"] {
            assert_eq!(read(name).as_deref(), Some("new"), "{name}");
        }
        assert!(read("config.toml").unwrap().ends_with("seed = 2"));
        assert_eq!((read("notes").as_deref(), read("tb/notes").as_deref()), (Some("old"), Some("old")));
        assert!(!out.join("merged/old.safetensors").exists() && !out.join(NEW).exists() && !out.join("half").exists());
    }

    #[test]
    fn a_stopped_run_is_an_object_with_the_command_that_resumes_it() {
        let stop = |text: &str| Error::new(Interrupted(text.into()));
        let found =
            stopped("sft", Path::new("o"), &stop("stopped after 1 step; all is kept in o/c. To go on:\n  f --resume"));
        assert_eq!(
            found.unwrap(),
            json!({"stage": "sft", "status": "stopped", "message": "stopped after 1 step; all is kept in o/c",
                   "resume": "f --resume", "output_dir": "o"})
        );
        let found =
            stopped("ppo", Path::new("o"), &stop("stopped after 2 steps; nothing was kept").context("ppo")).unwrap();
        assert_eq!(
            (&found["resume"], &found["message"]),
            (&Value::Null, &json!("stopped after 2 steps; nothing was kept"))
        );
        assert!(stopped("ppo", Path::new("o"), &invalid!("no")).is_none());
    }

    #[test]
    fn a_new_run_removes_only_its_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        prepare_output(out, "ppo", "").unwrap();
        // Runs of other commands, and someone's notes, in a folder of ppo's.
        let theirs =
            ["sft/adapter_model.safetensors", "reward/x", "adapter/adapter_config.json", "merged/model", "notes"];
        let ours = ["metrics.jsonl", "summary.json", "actor/adapter_model.safetensors", "critic/adapter_config.json"];
        let inside = ["actor/notes.md", "checkpoints/mine"];
        for name in [&theirs[..], &ours, &inside].concat() {
            fs::create_dir_all(out.join(name).parent().unwrap()).unwrap();
            fs::write(out.join(name), "x").unwrap();
        }
        prepare_output(out, "ppo", "").unwrap();
        let there = |name: &&str| out.join(name).exists();
        assert!(theirs.iter().chain(&inside).all(there));
        assert!(!ours.iter().any(there) && !out.join("critic").exists());
    }
}
