//! The program: arguments -> a command of `cli` -> an exit code.
//!
//! 0 is success, 2 an invalid input or configuration, 130 a run stopped on request, 141 a reader of stdout that is gone, 1 any
//! other failure. The chain of an
//! error's causes is printed once, on stderr. Read `cli/mod.rs` next.

use fourfold::train::world::launch;

#[global_allocator]
static ALLOCATOR: fourfold::host::meter::Counting<fourfold::host::allocator::Allocator> =
    fourfold::host::meter::Counting(fourfold::host::allocator::Allocator);

/// The allocator is configured before the runtime's first allocation, which already reserves address space.
#[cfg(target_os = "linux")]
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn before_main() {
        fourfold::host::keep_freed_memory();
    }
    before_main
};

fn main() {
    #[cfg(not(target_os = "linux"))]
    fourfold::host::keep_freed_memory();
    fourfold::report::quiet::print_directly();
    let ran = fourfold::train::stop::end_by_default().and_then(|()| fourfold::cli::run());
    let is_stopped = |error: &anyhow::Error| error.chain().any(|cause| cause.is::<fourfold::error::Interrupted>());
    let is_failure = ran.as_ref().is_err_and(|error| !is_stopped(error));
    let code = match ran {
        Ok(()) => 0,
        Err(error) if error.is::<fourfold::error::StdoutClosed>() => fourfold::error::exit_code(&error),
        // Another rank of the same run reports it.
        Err(error) if !launch::reports(&error) => fourfold::error::exit_code(&error),
        Err(error) => {
            let is_interrupted = error.is::<fourfold::error::Interrupted>();
            let text = fourfold::error::printable(&format!("{error:#}"));
            fourfold::tell!("{}{}{text}", launch::prefix(), if is_interrupted { "" } else { "error: " });
            fourfold::error::exit_code(&error)
        }
    };
    launch::leave(code, is_failure);
    std::process::exit(code);
}
