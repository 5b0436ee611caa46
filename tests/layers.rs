//! The walls of the house, read off the sources: the order of the rooms, what a header says its file does not depend on,
//! the files that headers point at, the width of comments, and the tree in README.md. A rule that is broken is named with file and
//! line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the ground to the roof. A room may import only from rooms of the lines before its own.
const FLOORS: &[&[&str]] = &[
    &["error", "rng", "report"],
    &["stats", "host", "device"],
    &["ops"],
    &["model"],
    &["tokenizer"],
    &["model_files"],
    &["config"],
    &["data"],
    &["train"],
    &["sft", "reward", "dpo", "distill"],
    &["ppo"],
    &["export", "planner", "page"],
    &["run", "watch"],
    &["quickstart", "serve"],
    &["cli"],
];

/// Rooms within a room, likewise: what stands later may import what stands before, never the other way.
const ROOMS_WITHIN: &[(&str, &[&str])] = &[("data", &["record", "files", "formats", "examples", "stream"])];

/// The nouns of a header's "does not depend on ..." that this test understands, each with the import paths that would
/// make the sentence untrue.
const NOUNS: &[(&str, &[&str])] = &[
    ("model", &["crate::model::"]),
    ("models", &["crate::model::"]),
    ("layers", &["crate::model::"]),
    ("layer", &["crate::model::"]),
    ("adapters", &["crate::model::adapter"]),
    ("adapter", &["crate::model::adapter"]),
    ("base", &["crate::model::base"]),
    ("configuration", &["crate::config"]),
    ("config", &["crate::config"]),
    ("data", &["crate::data"]),
    ("records", &["crate::data"]),
    ("tokenizer", &["crate::tokenizer"]),
    ("tokenizers", &["crate::tokenizer"]),
    ("tensors", &["candle_core"]),
    ("tensor", &["candle_core"]),
    ("optimizer", &["crate::train::adamw"]),
    ("optimizers", &["crate::train::adamw"]),
    ("stages", &["crate::sft", "crate::reward", "crate::dpo", "crate::distill", "crate::ppo"]),
    ("stage", &["crate::sft", "crate::reward", "crate::dpo", "crate::distill", "crate::ppo"]),
    ("planner", &["crate::planner"]),
    ("network", &["ureq"]),
    ("operations", &["crate::ops"]),
    ("operation", &["crate::ops"]),
    ("configurations", &["crate::config"]),
    ("kernels", &["crate::ops", "crate::device::kernels"]),
    ("cuda", &["cudarc", "crate::device::cuda"]),
    ("card", &["cudarc::driver", "crate::device::cuda"]),
    ("roles", &["crate::model::roles"]),
    ("formats", &["crate::data::formats"]),
    ("shaping", &["crate::ppo::rewards"]),
];

struct Source {
    path: PathBuf,
    /// Its module path below the crate: `["ops", "linear", "cpu"]`.
    module: Vec<String>,
    header: String,
    /// Line number and absolute path of each `use` of this crate or another outside of tests.
    imports: Vec<(usize, String)>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path, out: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// `a::{b, c::{self, d}}` as its single paths.
fn expand(tree: &str, prefix: &str, out: &mut Vec<String>) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap_or(tree).trim().trim_end_matches("::self");
        if !path.is_empty() {
            out.push(format!("{prefix}{path}"));
        }
        return;
    };
    let (head, body) = (&tree[..open], &tree[open + 1..tree.rfind('}').unwrap()]);
    let (mut depth, mut start) = (0, 0);
    for (i, c) in body.char_indices().chain([(body.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&body[start..i], &format!("{prefix}{head}"), out);
                start = (i + 1).min(body.len());
            }
            _ => {}
        }
    }
}

/// `super::x` of a module as `crate::...::x`.
fn absolute(path: &str, module: &[String]) -> String {
    let parts: Vec<&str> = path.split("::").collect();
    let ups = parts.iter().take_while(|p| **p == "super").count();
    if ups == 0 {
        return path.to_string();
    }
    let kept = &module[..module.len().saturating_sub(ups)];
    ["crate"]
        .into_iter()
        .chain(kept.iter().map(String::as_str))
        .chain(parts[ups..].iter().copied())
        .collect::<Vec<_>>()
        .join("::")
}

fn read(path: PathBuf) -> Source {
    let text = fs::read_to_string(&path).unwrap();
    let relative = path.strip_prefix(root().join("src")).unwrap().with_extension("");
    let mut module: Vec<String> = relative.iter().map(|p| p.to_str().unwrap().to_string()).collect();
    if module.last().is_some_and(|m| m == "mod") {
        module.pop();
    }
    let header = text.lines().take_while(|l| l.starts_with("//!")).map(|l| l[3..].trim()).collect::<Vec<_>>().join(" ");
    let (mut imports, mut pending): (Vec<_>, Option<(usize, String)>) = (vec![], None);
    for (number, line) in text.lines().enumerate().map(|(i, l)| (i + 1, l)) {
        if line.starts_with("#[cfg(test)]") {
            break;
        }
        let code = line.split("//").next().unwrap_or("").trim();
        let code = code.strip_prefix("pub ").or(code.strip_prefix("pub(crate) ")).unwrap_or(code);
        let begun = match (pending.take(), code.strip_prefix("use ")) {
            (Some((at, text)), _) => Some((at, format!("{text} {code}"))),
            (None, Some(rest)) => Some((number, rest.to_string())),
            (None, None) => None,
        };
        match begun {
            Some((at, text)) if text.contains(';') => {
                let mut paths = vec![];
                expand(text.split(';').next().unwrap(), "", &mut paths);
                imports.extend(paths.into_iter().map(|p| (at, absolute(&p, &module))));
            }
            unfinished => pending = unfinished,
        }
    }
    Source { path, module, header, imports }
}

fn sources() -> Vec<Source> {
    let mut paths = vec![];
    rust_files(&root().join("src"), &mut paths);
    let is_test = |p: &PathBuf| p.file_name().is_some_and(|n| n == "tests.rs" || n == "gradcheck.rs");
    let all: Vec<Source> = paths.into_iter().filter(|p| !is_test(p)).map(read).collect();
    assert!(all.len() > 150, "only {} sources were found", all.len());
    all
}

fn report(faults: Vec<String>) {
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

fn place(source: &Source) -> String {
    source.path.strip_prefix(root()).unwrap().display().to_string()
}

#[test]
fn no_room_imports_from_a_room_above_it() {
    let floor: BTreeMap<&str, usize> =
        FLOORS.iter().enumerate().flat_map(|(i, rooms)| rooms.iter().map(move |room| (*room, i))).collect();
    let mut faults = vec![];
    for source in sources().iter().filter(|s| !["lib", "main"].contains(&s.module[0].as_str())) {
        let room = source.module[0].as_str();
        let Some(&own) = floor.get(room) else {
            faults.push(format!("{}: the room `{room}` has no floor in tests/layers.rs", place(source)));
            continue;
        };
        for (line, import) in &source.imports {
            let Some(target) = import.strip_prefix("crate::").and_then(|p| p.split("::").next()) else { continue };
            if target != room && floor.get(target).is_some_and(|&other| other >= own) {
                faults.push(format!(
                    "{}:{line}: `{room}` stands below `{target}` or beside it and imports {import}",
                    place(source)
                ));
            }
        }
    }
    report(faults);
}

#[test]
fn no_import_runs_up_inside_of_a_room() {
    let mut faults = vec![];
    for (room, order) in ROOMS_WITHIN {
        for source in sources().iter().filter(|s| s.module[0] == *room && s.module.len() > 1) {
            let Some(own) = order.iter().position(|o| *o == source.module[1]) else { continue };
            for (line, import) in &source.imports {
                let Some(target) = import.strip_prefix(&format!("crate::{room}::")).and_then(|p| p.split("::").next())
                else {
                    continue;
                };
                if order.iter().position(|o| *o == target).is_some_and(|other| other > own) {
                    faults.push(format!(
                        "{}:{line}: `{}` comes before `{target}` and imports {import}",
                        place(source),
                        order[own]
                    ));
                }
            }
        }
    }
    report(faults);
}

#[test]
fn a_header_that_says_what_its_file_does_not_depend_on_is_true() {
    let (mut faults, mut checked) = (vec![], 0);
    for source in &sources() {
        let lower = source.header.to_lowercase();
        for clause in lower.split("not depend on").skip(1) {
            let clause = clause.split(['.', ';', ':', '(']).next().unwrap_or("");
            for word in clause.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty()) {
                let Some((_, forbidden)) = NOUNS.iter().find(|(noun, _)| *noun == word) else { continue };
                // An operation that does not depend on others still uses the room's machinery.
                if forbidden.contains(&"crate::ops") && source.module.first().is_some_and(|room| room == "ops") {
                    continue;
                }
                checked += 1;
                for (line, import) in &source.imports {
                    let own = format!("crate::{}::", source.module.join("::"));
                    if forbidden.iter().any(|f| import.starts_with(f)) && !import.starts_with(&own) {
                        faults.push(format!(
                            "{}:{line}: the header denies `{word}`, and the file imports {import}",
                            place(source)
                        ));
                    }
                }
            }
        }
    }
    assert!(checked > 30, "only {checked} denials were understood");
    report(faults);
}

#[test]
fn every_file_begins_with_a_header() {
    let bare = sources().into_iter().filter(|source| source.header.trim().is_empty());
    report(bare.map(|source| format!("{}: the file has no header (//!)", place(&source))).collect());
}

#[test]
fn every_file_that_a_header_names_exists() {
    let files: BTreeSet<PathBuf> = {
        let mut all = vec![];
        ["src", "tests", "benches"].iter().for_each(|folder| rust_files(&root().join(folder), &mut all));
        all.into_iter().collect()
    };
    let (mut faults, mut checked) = (vec![], 0);
    for source in &sources() {
        for word in source.header.split(|c: char| c.is_whitespace() || "`()[],;:".contains(c)) {
            let word = word.trim_end_matches('.').trim_start_matches("../");
            if !word.ends_with(".rs") || word == ".rs" {
                continue;
            }
            checked += 1;
            let beside = source.path.parent().unwrap().join(word);
            let below = source.path.with_extension("").join(word);
            let above = source.path.parent().and_then(Path::parent).unwrap().join(word);
            let found = [beside, below, above, root().join("src").join(word), root().join(word)];
            if !found.iter().any(|p| files.contains(p)) {
                faults.push(format!("{}: the header names {word}, which does not exist", place(source)));
            }
        }
    }
    assert!(checked > 100, "only {checked} names of files were found in headers");
    report(faults);
}

#[test]
fn the_tree_in_the_readme_names_every_room_and_no_other() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let tree =
        readme.split("\nsrc/\n").nth(1).and_then(|t| t.split("```").next()).expect("README.md has a tree of src/");
    let inside = tree.lines().take_while(|l| l.starts_with("  ")).collect::<Vec<_>>();
    let named: BTreeSet<String> = inside
        .iter()
        .flat_map(|l| l.trim_start().split("   ").next().unwrap_or("").split_whitespace())
        .map(|w| w.trim_end_matches('/').trim_end_matches(".rs").to_string())
        .collect();
    let there: BTreeSet<String> = fs::read_dir(root().join("src"))
        .unwrap()
        .map(|e| e.unwrap().path().file_stem().unwrap().to_str().unwrap().to_string())
        .collect();
    let missing: Vec<_> = there.difference(&named).collect();
    let surplus: Vec<_> = named.difference(&there).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "README's tree lacks {missing:?} and names {surplus:?}, which are not there"
    );
}

/// `rustfmt` wraps code and no comment.
#[test]
fn no_comment_is_longer_than_132_columns() {
    let mut paths = vec![];
    ["src", "tests", "benches"].iter().for_each(|folder| rust_files(&root().join(folder), &mut paths));
    let (mut faults, mut checked) = (vec![], 0);
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("//")) {
            checked += 1;
            let columns = line.chars().count();
            if columns > 132 {
                faults.push(format!("{}:{}: the comment has {columns} columns", path.display(), i + 1));
            }
        }
    }
    assert!(checked > 10_000, "only {checked} lines of comments were found");
    report(faults);
}

/// `eprintln!` and `println!` panic where nobody reads what they print, and a run of hours would end by it.
#[test]
fn nothing_is_printed_by_what_panics_when_it_cannot_be_printed() {
    let mut paths = vec![];
    rust_files(&root().join("src"), &mut paths);
    let mut faults = vec![];
    for path in paths.into_iter().filter(|path| !path.ends_with("report/quiet.rs")) {
        let text = fs::read_to_string(&path).unwrap();
        let ours = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let lines = ours.lines().enumerate().filter(|(_, line)| {
            let line = line.trim_start();
            ["println!(", "print!(", "eprintln!(", "eprint!("].iter().any(|name| line.starts_with(name))
        });
        faults.extend(lines.map(|(i, line)| format!("{}:{}: {}", path.display(), i + 1, line.trim())));
    }
    report(faults);
}
