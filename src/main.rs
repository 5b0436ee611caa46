//! The command line: arguments -> a command of `cli` -> an exit code. 0 done, 2 the input or configuration is wrong, 1
//! anything else. The error's chain is printed once, on stderr.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    fourfold::memory::keep_freed_memory();
    let code = match fourfold::cli::run() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error:#}");
            fourfold::error::exit_code(&error)
        }
    };
    std::process::exit(code);
}
