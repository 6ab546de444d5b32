//! The entry point: arguments in, exit code out; before that, `libcuda` and the allocator.

use std::io::Write as _;
use std::process::ExitCode;

use sd_server::cli;
use sd_server::host::cuda_compat;
use sd_server::request::ValidationError;

/// `EX_USAGE` of sysexits.h: invalid arguments; a retry will not help.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    if let Err(error) = cuda_compat::prefer(cli::library_path().as_deref()) {
        // The log is not started yet. Without the compatibility library the host's own may work.
        let _ = writeln!(std::io::stderr(), "the compatibility libcuda cannot be used: {error}");
    }
    // Before any thread is started, since it applies to later ones only.
    sd_models::keep_freed_memory();
    let config = match cli::read(std::env::args_os()) {
        Ok(config) => config,
        Err(error) => {
            // If not even this can be printed, nothing is left to do.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match sd_server::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let usage = error.downcast_ref::<ValidationError>().is_some();
            ExitCode::from(if usage { USAGE } else { 1 })
        }
    }
}
