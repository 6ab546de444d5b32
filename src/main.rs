//! The doorway: arguments in, exit code out.

use std::io::Write as _;
use std::process::ExitCode;

use sd_server::cli;
use sd_server::host::cuda_compat;
use sd_server::request::ValidationError;

/// `EX_USAGE` of sysexits.h: what was typed cannot be done, and trying again will not help.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    if let Err(error) = cuda_compat::prefer(cli::library_path().as_deref()) {
        // There is no log yet, and the host's own library may do.
        let _ = writeln!(std::io::stderr(), "the compatibility libcuda cannot be used: {error}");
    }
    // Before there are threads, whose allocators it would not reach.
    sd_models::keep_freed_memory();
    let config = match cli::read(std::env::args_os()) {
        Ok(config) => config,
        Err(error) => {
            // Nothing is left to do when not even this can be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match sd_server::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            let usage = error.downcast_ref::<ValidationError>().is_some();
            ExitCode::from(if usage { USAGE } else { 1 })
        }
    }
}
