//! `chat` in a terminal: a line is edited, Ctrl-C ends neither the prompt nor the program, and an earlier line comes back.
//! `watch` in a terminal: it follows a run that trains, and gives the terminal back however it ends.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::support::Place;

/// A program with a terminal of its own.
struct Terminal {
    child: Child,
    keys: File,
    shown: Receiver<Vec<u8>>,
    /// What was shown and is not yet waited for.
    rest: String,
}

impl Terminal {
    fn open(place: &Place, args: &[&str]) -> Self {
        Self::open_with(place, args, &[])
    }

    fn open_with(place: &Place, args: &[&str], variables: &[(&str, &str)]) -> Self {
        let (mut master, mut slave) = (0, 0);
        let null = std::ptr::null_mut();
        let size = libc::winsize { ws_row: 30, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 };
        let size = (&raw const size).cast_mut();
        // SAFETY: both descriptors are written by the call, and the size is read; name and settings are left to the system.
        let opened = unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), size) };
        assert_eq!(opened, 0);
        // SAFETY: the descriptors are open and belong to nobody else.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.args(args).current_dir(place.path("")).env("TERM", "xterm").env_remove("NO_COLOR");
        command.envs(variables.iter().copied());
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
        // SAFETY: between fork and exec only two calls of the system are made, which allocate nothing.
        unsafe {
            command.pre_exec(|| {
                // Its own session, whose terminal this one is: Ctrl-C then is a signal to it.
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let (to, shown) = channel();
        let mut from = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(bytes @ 1..) = from.read(&mut buffer) {
                if to.send(buffer[..bytes].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keys: master, shown, rest: String::new() }
    }

    /// Whether the terminal collects lines and shows what is typed, as a shell needs it.
    fn is_usual(&self) -> bool {
        // SAFETY: a plain struct that the call fills.
        let mut settings: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and the address is of a live struct.
        assert_eq!(unsafe { libc::tcgetattr(self.keys.as_raw_fd(), &raw mut settings) }, 0);
        settings.c_lflag & (libc::ICANON | libc::ECHO) == libc::ICANON | libc::ECHO
    }

    /// The program's exit code, and what it showed last.
    fn end(&mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        while let Ok(bytes) = self.shown.recv_timeout(Duration::from_millis(200)) {
            self.rest.push_str(&String::from_utf8_lossy(&bytes));
        }
        (code, std::mem::take(&mut self.rest))
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// What is shown until `text` is.
    fn until(&mut self, text: &str) -> String {
        self.within(60, text).unwrap_or_else(|| panic!("{text:?} did not come: {}", self.rest))
    }

    /// The same, if it comes within some seconds.
    fn within(&mut self, seconds: u64, text: &str) -> Option<String> {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.rest.find(text) {
                let behind = self.rest.split_off(at + text.len());
                return Some(std::mem::replace(&mut self.rest, behind));
            }
            let left = Duration::from_secs(seconds).checked_sub(begun.elapsed())?;
            let bytes = self.shown.recv_timeout(left).ok()?;
            self.rest.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn chat_edits_lines_and_ctrl_c_ends_a_response_and_not_the_program() {
    let place = Place::new();
    let mut chat = Terminal::open(&place, &["chat", "--base", "base", "--max-new-tokens", "200", "--temperature", "2"]);
    chat.until("> ");
    chat.press("\x03");
    chat.until("/exit or Ctrl-D ends");
    chat.until("> ");
    // The last letter is taken back.
    chat.press("How is the hotelX\x7f?\r");
    chat.until("\n");
    chat.press("\x03");
    let seen = chat.until("tokens per second");
    assert!(!seen.contains("error"), "{seen}");
    chat.until("> ");
    // The arrow upwards brings the line back, as it was sent. A Ctrl-C that came after the response's end empties it once.
    let mut back = false;
    for _ in 0..5 {
        chat.press("\x1b[A");
        back = chat.within(10, "How is the hotel?").is_some();
        if back {
            break;
        }
    }
    assert!(back, "{}", chat.rest);
    chat.press("\r");
    chat.until("tokens per second");
    chat.until("> ");
    chat.press("/exit\r");
    assert!(chat.child.wait().unwrap().success());
}

/// A process that is ended with its test.
struct Trains(Child);

impl Drop for Trains {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn watch_follows_a_run_that_trains_and_gives_the_terminal_back_on_keys_and_signals() {
    /// The usual screen and the cursor come back.
    const RESTORED: [&str; 2] = ["\x1b[?1049l", "\x1b[?25h"];
    let place = Place::new();
    let args = ["sft", "run.toml", "--set", "sft.num_train_epochs=1000000", "--out", "live"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.args(args).current_dir(place.path("")).stderr(Stdio::null());
    let _run = Trains(command.spawn().unwrap());
    let begun = Instant::now();
    // A screen is drawn as what changed since the last one, so the first has to show the run in its stage.
    while !place.run("watch live --json").stdout.contains("\"state\":\"running\"") {
        assert!(begun.elapsed() < Duration::from_secs(60), "the run did not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    let step = |shown: &str| -> u64 {
        let number = shown.rsplit("sft, step ").next().unwrap();
        number.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{shown}"))
    };
    for (keys, signal, code) in [
        ("q", 0, Some(0)),
        ("\x1b", 0, Some(0)),
        ("\x03", 0, Some(0)),
        ("", libc::SIGTERM, Some(130)),
        ("", libc::SIGHUP, Some(130)),
    ] {
        let mut watch = Terminal::open(&place, &["watch", "live"]);
        watch.until("\x1b[?1049h");
        watch.until("running, ");
        let seen = watch.until(" of 2000000");
        assert!(!watch.is_usual(), "keys are read one by one");
        assert!(step(&seen) > 0 || seen.contains("step 0"), "{seen}");
        watch.press("\t");
        watch.until("optimizer");
        watch.press(keys);
        if signal != 0 {
            // SAFETY: the process is this test's child and is not waited for yet.
            assert_eq!(unsafe { libc::kill(watch.child.id() as i32, signal) }, 0);
        }
        let (found, last) = watch.end();
        assert_eq!(found, code, "{keys:?} {signal}: {last}");
        assert!(RESTORED.iter().all(|sequence| last.contains(sequence)), "{keys:?} {signal}: {last:?}");
        assert!(watch.is_usual(), "{keys:?} {signal}");
    }
    // The numbers move while the run trains.
    let told = |place: &Place| place.run("watch live --json").stdout;
    let first = told(&place);
    let begun = Instant::now();
    while told(&place) == first {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing moved: {first}");
    }
}

#[test]
fn no_color_takes_the_colours_from_everything_that_has_some() {
    /// Whether a text chooses a colour: 30 to 37, 90 to 97, 38 or 48 in an `\x1b[...m`.
    fn has_colour(text: &str) -> bool {
        let chosen = text.split("\x1b[").skip(1).filter_map(|part| part.split_once('m'));
        let mut numbers = chosen.filter(|(codes, _)| codes.bytes().all(|b| b.is_ascii_digit() || b == b';'));
        numbers.any(|(codes, _)| {
            codes
                .split(';')
                .filter_map(|code| code.parse::<u32>().ok())
                .any(|code| matches!(code, 30..=38 | 48 | 90..=97))
        })
    }
    let place = Place::new();
    assert_eq!(place.run("sft run.toml --out done").code, 0);
    for (args, keys) in [(&["data", "run.toml", "--phase", "sft"][..], ""), (&["watch", "done"], "q")] {
        for (value, colours) in [("", true), ("1", false)] {
            let mut program = Terminal::open_with(&place, args, &[("NO_COLOR", value)]);
            let seen = if keys.is_empty() { String::new() } else { program.until("finished ") };
            program.press(keys);
            let (code, rest) = program.end();
            assert_eq!(code, Some(0), "{args:?}");
            assert_eq!(has_colour(&(seen + &rest)), colours, "{args:?} NO_COLOR={value}: {rest:?}");
        }
    }
    // clap's headings are bold and underlined.
    for (value, styled) in [("", true), ("1", false)] {
        let (_, shown) = Terminal::open_with(&place, &["--help"], &[("NO_COLOR", value)]).end();
        assert_eq!(shown.contains("\x1b["), styled, "NO_COLOR={value}: {shown:?}");
    }
}

#[test]
fn work_that_takes_long_shows_a_bar_in_a_terminal_a_line_elsewhere_and_nothing_where_quiet_was_asked_for() {
    let place = Place::new();
    place.train_sft_and_reward();
    // More than any machine scores in the two seconds before progress is shown; the program is ended once it was.
    let pairs = std::fs::read_to_string(place.path("pairs.jsonl")).unwrap();
    place.write("many.jsonl", pairs.repeat(10_000));
    let args = ["score", "--base", "base", "--adapter", "out/reward/adapter", "--data", "many.jsonl"];
    let mut terminal = Terminal::open(&place, &args);
    terminal.until("score: ");
    let bar = terminal.until(" left");
    assert!(bar.contains("% ") || bar.contains("%, "), "{bar:?}");
    assert!(bar.contains(" of 60,000 records, ") && bar.contains(" per second, "), "{bar:?}");
    drop(terminal);
    let spawn = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.args(args).current_dir(place.path("")).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut child = spawn(&args);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = lines.by_ref().map(Result::unwrap).find(|line| line.starts_with("score: ")).unwrap();
    assert!(line.contains("%, ") && line.contains(" of 60,000 records, ") && line.ends_with(" left"), "{line:?}");
    assert!(!line.contains(['\r', '\x1b']), "{line:?}");
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.stdout.is_empty(), "progress is no result");
    let mut child = spawn(&[&["--quiet"], &args[..]].concat());
    std::thread::sleep(Duration::from_secs(4));
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}
