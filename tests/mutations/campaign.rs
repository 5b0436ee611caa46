//! Feeds a reader its mutated inputs and holds it to the promise. The inputs of one reader are read in a process of their
//! own: an abort, an overflown stack or an endless loop ends that process, and this one says which input did it.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;
use fourfold::error::{exit_code, printable};
use fourfold::rng::{SplitMix64, derive};
use tempfile::TempDir;

use crate::allocation::most_held;
use crate::mutate::{Form, mutate};

/// A folder of valid files, one of which is mutated.
pub struct Specimen {
    /// (name, content); a name may have one folder in it.
    pub files: Vec<(String, Vec<u8>)>,
    /// Which of them.
    pub target: usize,
    /// What that file is.
    pub form: Form,
}

impl Specimen {
    /// One file alone.
    pub fn file(name: &str, content: impl Into<Vec<u8>>, form: Form) -> Self {
        Self { files: vec![(name.into(), content.into())], target: 0, form }
    }

    /// The mutated file's name.
    pub fn name(&self) -> &str {
        &self.files[self.target].0
    }
}

/// Reads the folder whose file of that name is mutated.
type Read = dyn Fn(&Path, &str) -> Result<()>;

/// A reader of foreign bytes.
pub struct Reader {
    /// Valid inputs.
    pub specimens: Vec<Specimen>,
    /// Reads the folder whose `name`d file is mutated, as far as the program would before it trains.
    pub read: Box<Read>,
    /// Brings sums and lengths in line with what was mutated, where the reader would otherwise see nothing but those.
    pub mend: Option<fn(&Path)>,
    /// Exit codes that an error may have.
    pub codes: &'static [i32],
}

impl Reader {
    /// Errors are bad input.
    pub fn new(specimens: Vec<Specimen>, read: impl Fn(&Path, &str) -> Result<()> + 'static) -> Self {
        Self { specimens, read: Box::new(read), mend: None, codes: &[2] }
    }
}

/// Processor time for one input, of all threads.
const LONGEST: Duration = Duration::from_secs(8);
/// Without a sign of life for so long, a reader hangs.
const HANGS: Duration = Duration::from_secs(90);
/// Beyond twice the input.
const ROOM: usize = 64 << 20;
/// A reader that asks for more ends here and not with the machine's memory.
const ADDRESSES: libc::rlim_t = 6 << 30;
/// The longest message that is still a clear one.
const MESSAGE: usize = 8192;
/// A campaign ends early after so many faults.
const FAULTS: usize = 12;

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the campaign of the test `name`.
pub fn campaign(name: &str, reader: fn() -> Reader) {
    let (count, seed) =
        (from_env("FOURFOLD_MUTATIONS").unwrap_or(2000), from_env("FOURFOLD_MUTATION_SEED").unwrap_or(1));
    if let Some(progress) = std::env::var_os("FOURFOLD_MUTATION_WORKER") {
        // Before anything is read: panics of libraries that the program expects are caught in front of this.
        std::panic::set_hook(Box::new(|info| {
            eprintln!("{info}");
            PANICS.lock().unwrap().push(info.to_string().replace('\n', " "));
        }));
        return Worker::new(reader(), seed, name, Path::new(&progress)).run(count);
    }
    let dir = tempfile::tempdir().unwrap();
    let progress = dir.path().join("progress");
    fs::write(&progress, 0u64.to_le_bytes()).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env("FOURFOLD_MUTATION_WORKER", &progress)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let drained = |mut from: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let mut text = vec![];
            from.read_to_end(&mut text).ok();
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = drained(Box::new(child.stdout.take().unwrap()));
    let err = drained(Box::new(child.stderr.take().unwrap()));
    let (mut at, mut since, mut hangs) = (0, Instant::now(), false);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
        let now = fs::read(&progress).unwrap().try_into().map_or(0, u64::from_le_bytes);
        if now != at {
            (at, since) = (now, Instant::now());
        } else if since.elapsed() > HANGS {
            hangs = true;
            child.kill().ok();
        }
    };
    let (out, err) = (out.join().unwrap(), err.join().unwrap());
    at = fs::read(&progress).unwrap().try_into().map_or(0, u64::from_le_bytes);
    let told: Vec<&str> = out.lines().filter(|line| line.contains("mutations: ")).collect();
    let tail: String =
        err.lines().rev().take(12).collect::<Vec<_>>().into_iter().rev().fold(String::new(), |mut all, line| {
            let _ = writeln!(all, "{line}");
            all
        });
    assert!(!hangs, "{name}: input {at} of seed {seed} hangs the reader");
    assert!(status.success(), "{name}: ended with {status} at input {at} of seed {seed}:\n{}\n{tail}", told.join("\n"));
    println!("{}", told.join("\n"));
}

static PANICS: Mutex<Vec<String>> = Mutex::new(vec![]);

struct Worker<'n> {
    reader: Reader,
    dirs: Vec<TempDir>,
    seed: u64,
    name: &'n str,
    progress: fs::File,
}

#[derive(Default)]
struct Counts {
    read: u64,
    refused: u64,
    slowest: Duration,
    most: usize,
}

impl<'n> Worker<'n> {
    fn new(reader: Reader, seed: u64, name: &'n str, progress: &Path) -> Self {
        let dirs = reader.specimens.iter().map(|specimen| written(&specimen.files)).collect();
        let progress = fs::OpenOptions::new().write(true).open(progress).unwrap();
        let most = libc::rlimit { rlim_cur: ADDRESSES, rlim_max: ADDRESSES };
        // SAFETY: the address is of a live rlimit.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const most) }, 0);
        Self { reader, dirs, seed, name, progress }
    }

    fn run(&self, count: u64) {
        // What is made once in a process, as pools of threads are, is no input's. And a valid input must be read.
        for (specimen, dir) in self.reader.specimens.iter().zip(&self.dirs) {
            if let Err(error) = (self.reader.read)(dir.path(), specimen.name()) {
                println!("mutations: {}: the valid {} is refused: {error:#}", self.name, specimen.name());
                std::process::exit(1);
            }
        }
        let (mut counts, mut faults) = (Counts::default(), vec![]);
        let only = from_env("FOURFOLD_MUTATION_CASE");
        for case in only.map_or(0..count, |case| case..case + 1) {
            self.progress.write_at(&case.to_le_bytes(), 0).unwrap();
            if let Err(fault) = self.case(case, &mut counts) {
                println!("mutations: {}: input {case} of seed {}: {fault}", self.name, self.seed);
                faults.push(fault);
                if faults.len() == FAULTS {
                    break;
                }
            }
        }
        println!(
            "mutations: {}: {count} inputs of seed {}: {} read, {} refused; at most {:.1} MiB and {:.0} ms each",
            self.name,
            self.seed,
            counts.read,
            counts.refused,
            counts.most as f64 / f64::from(1 << 20),
            counts.slowest.as_secs_f64() * 1e3
        );
        assert!(faults.is_empty(), "{} faults", faults.len());
    }

    fn case(&self, case: u64, counts: &mut Counts) -> Result<(), String> {
        let mut rng = SplitMix64::new(derive(self.seed, &[case]));
        let specimens = &self.reader.specimens;
        let chosen = rng.below(specimens.len());
        let (specimen, dir) = (&specimens[chosen], self.dirs[chosen].path());
        let alike: Vec<&Specimen> = specimens.iter().filter(|s| s.form == specimen.form).collect();
        let other = alike[rng.below(alike.len())];
        let (_, valid) = &specimen.files[specimen.target];
        let bytes = mutate(&mut rng, valid, &other.files[other.target].1, specimen.form);
        let path = dir.join(specimen.name());
        fs::write(&path, &bytes).unwrap();
        if let Some(mend) = self.reader.mend.filter(|_| rng.below(4) > 0) {
            mend(dir);
        }
        let size: usize = bytes.len() + specimen.files.iter().map(|(_, content)| content.len()).sum::<usize>();
        let begun = processor_time();
        let (result, most) = most_held(|| {
            let result =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.reader.read)(dir, specimen.name())));
            result.map(|read| read.map_err(|error| (exit_code(&error), printable(&format!("{error:#}")))))
        });
        let took = processor_time().saturating_sub(begun);
        counts.slowest = counts.slowest.max(took);
        counts.most = counts.most.max(most);
        let panics = std::mem::take(&mut *PANICS.lock().unwrap());
        let verdict = match result {
            Err(_) => Err(format!("panic: {}", panics.join("; "))),
            Ok(_) if !panics.is_empty() => Err(format!("panic on another thread: {}", panics.join("; "))),
            Ok(_) if took > LONGEST => Err(format!("{took:?} of processor time")),
            Ok(_) if most > 2 * size + ROOM => Err(format!("{} MiB for {size} bytes", most >> 20)),
            Ok(Ok(())) => {
                counts.read += 1;
                Ok(())
            }
            Ok(Err((code, message))) => {
                counts.refused += 1;
                let short: String = message.chars().take(300).collect();
                match () {
                    () if !self.reader.codes.contains(&code) => Err(format!("exit code {code}: {short}")),
                    () if message.trim().is_empty() || message.len() > MESSAGE => {
                        Err(format!("a message of {} bytes: {short}", message.len()))
                    }
                    () => Ok(()),
                }
            }
        };
        if verdict.is_err() {
            let kept = kept(self.name, case, specimen.name(), &bytes);
            println!("mutations: {}: input {case} is kept in {}", self.name, kept.display());
        }
        if self.reader.mend.is_some() {
            specimen.files.iter().for_each(|(name, content)| fs::write(dir.join(name), content).unwrap());
        }
        verdict
    }
}

fn kept(name: &str, case: u64, file: &str, bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("{}-{case}-{}", name.replace("::", "-"), file.replace('/', "-")));
    fs::write(&path, bytes).ok();
    path
}

fn written(files: &[(String, Vec<u8>)]) -> TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    dir
}

/// Of this process, all threads.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the address is of a live timespec.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
