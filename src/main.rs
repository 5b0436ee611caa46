//! The command line: arguments -> a command of `cli` -> an exit code. 0 done, 2 the input or configuration is wrong, 130 it
//! was asked to stop, 1 anything else. The error's chain is printed once, on stderr.

#[global_allocator]
static ALLOCATOR: fourfold::memory::meter::Counting<fourfold::allocator::Allocator> =
    fourfold::memory::meter::Counting(fourfold::allocator::Allocator);

fn main() {
    fourfold::memory::keep_freed_memory();
    let code = match fourfold::cli::run() {
        Ok(()) => 0,
        Err(error) => {
            let is_interrupted = error.is::<fourfold::error::Interrupted>();
            let text = fourfold::error::printable(&format!("{error:#}"));
            eprintln!("{}{text}", if is_interrupted { "" } else { "error: " });
            fourfold::error::exit_code(&error)
        }
    };
    std::process::exit(code);
}
