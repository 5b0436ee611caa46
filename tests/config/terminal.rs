//! `chat` in a terminal: a line is edited, Ctrl-C ends neither the prompt nor the program, and an earlier line comes back.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
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
        let (mut master, mut slave) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: both descriptors are written by the call; name, settings and size are left to the system.
        assert_eq!(unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) }, 0);
        // SAFETY: the descriptors are open and belong to nobody else.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        command.args(args).current_dir(place.path("")).env("TERM", "xterm");
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
