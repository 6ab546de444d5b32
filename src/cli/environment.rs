//! The environment: variables of options and of the Python libraries. Nothing else reads it.

use std::ffi::OsString;
use std::fmt;
use std::num::{IntErrorKind, ParseIntError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use hf_hub::Cache;

use super::args::Args;
use crate::options::{min, switch};
use crate::source::Hub;

const DEFAULT_PORT: u16 = 8080;

/// Time without a byte from the hub after which a download is resumed.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The arguments with those options behind them whose variables have white space around their
/// value: files and secrets end in a line end, which is no part of it. Typed options come first.
pub(super) fn with_trimmed_variables(mut args: Vec<OsString>) -> Vec<OsString> {
    let command = Args::command();
    let named = |known: &&clap::Command| args.get(1).is_some_and(|name| name == known.get_name());
    let Some(subcommand) = command.get_subcommands().find(named) else { return args };
    let trimmed = |option: &clap::Arg| {
        let value = std::env::var(option.get_env()?).ok()?;
        let plain = value.trim();
        let long = format!("--{}", option.get_long()?);
        let is_typed = args.iter().any(|arg| is_option(arg, &long));
        let is_other = plain != value && !plain.is_empty() && !is_typed;
        if !is_other || is_switched_off(option, plain) {
            return None;
        }
        let takes_value = option.get_action().takes_values();
        Some(OsString::from(if takes_value { format!("{long}={plain}") } else { long }))
    };
    let trimmed: Vec<_> = subcommand.get_arguments().filter_map(trimmed).collect();
    // Behind `--` there are no options.
    let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    args.splice(end..end, trimmed);
    args
}

/// Whether a variable says that an option without a value is off.
fn is_switched_off(option: &clap::Arg, value: &str) -> bool {
    !option.get_action().takes_values() && switch(value) == Ok(false)
}

/// Whether an argument is the option of this name, with its value or without.
fn is_option(arg: &OsString, long: &str) -> bool {
    arg.to_string_lossy().split('=').next() == Some(long)
}

/// The clap command. An empty environment variable counts as not set, because templates and compose
/// files can leave a variable empty but cannot omit it.
pub(super) fn command() -> clap::Command {
    let trimmed = |arg: clap::Arg| {
        let value = arg.get_env().and_then(std::env::var_os);
        let Some(value) = value.and_then(|value| value.into_string().ok()) else { return arg };
        match value.trim() {
            // An empty key must not make protected routes public.
            "" if arg.get_id() == "api_keys" => arg,
            "" => arg.env(None::<&str>),
            plain if plain != value && is_switched_off(&arg, plain) => arg.env(None::<&str>),
            _ => arg,
        }
    };
    // A number below the least is refused as that, not as an option.
    let signed = |arg: clap::Arg| {
        let takes = arg.get_action().takes_values() && !arg.is_positional();
        if takes { arg.allow_negative_numbers(true) } else { arg }
    };
    // An option names the unit of its value, else its last word is the kind of its value.
    let placeholder = |arg: clap::Arg| {
        let derived = arg.get_id().as_str().to_uppercase();
        let is_derived = arg.get_value_names().is_some_and(|names| names[0] == *derived);
        let mut words = arg.get_long().unwrap_or_default().rsplit('-');
        let last = words.clone().next().unwrap_or_default();
        let word = words.find(|word| *word == "bytes").unwrap_or(last).to_uppercase();
        if is_derived && !word.is_empty() { arg.value_name(word) } else { arg }
    };
    Args::command().mut_subcommands(|subcommand| {
        subcommand.mut_args(trimmed).mut_args(placeholder).mut_args(signed)
    })
}

/// Names the environment variable that an invalid value is from, if it is from one.
pub(super) fn name_variable(mut error: clap::Error, args: &[OsString]) -> clap::Error {
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let option = option.split(' ').next().unwrap_or_default().to_owned();
    let is_typed = |arg: &OsString| is_option(arg, &option);
    let command = Args::command();
    let mut known = command.get_subcommands().flat_map(clap::Command::get_arguments);
    let known = known.find(|arg| arg.get_long() == option.strip_prefix("--"));
    if let Some(variable) = known.and_then(clap::Arg::get_env)
        && [ErrorKind::InvalidValue, ErrorKind::ValueValidation].contains(&error.kind())
        && !args.iter().any(is_typed)
    {
        let variable = variable.to_string_lossy().into_owned();
        error.insert(ContextKind::InvalidArg, ContextValue::String(variable));
    }
    error
}

/// Says what a whole number must be in words of ours, not in those of Rust's parser.
pub(super) fn in_words(error: clap::Error) -> clap::Error {
    let source = std::error::Error::source(&error);
    let Some(cause) = source.and_then(|cause| cause.downcast_ref::<ParseIntError>()) else {
        return error;
    };
    let reason = match cause.kind() {
        IntErrorKind::PosOverflow => "is too large",
        _ => "must be a whole number of at least 0",
    };
    let text = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    let (option, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
    usage(format!("invalid value '{value}' for '{option}': {reason}"))
}

/// A sentence for each variable that is named like those of the options and is none of them.
pub(super) fn unknown_variables() -> Vec<String> {
    let command = Args::command();
    let options = command.get_subcommands().flat_map(clap::Command::get_arguments);
    let mut known: Vec<_> = options.filter_map(|option| option.get_env()?.to_str()).collect();
    known.push("SD_PORT");
    // Kubernetes sets some for each service, such as one that is named sd-server.
    let of_service = |name: &str, value: &str| {
        ["_SERVICE_", "_PORT_"].iter().any(|part| name.contains(part)) || value.contains("://")
    };
    let unknown = |(name, value): (OsString, OsString)| {
        let (name, value) = (name.to_str()?.to_owned(), value.to_string_lossy());
        let is_unknown = name.starts_with("SD_") && !known.contains(&name.as_str());
        (is_unknown && !of_service(&name, &value)).then_some(name)
    };
    let mut unknown: Vec<_> = std::env::vars_os().filter_map(unknown).collect();
    unknown.sort();
    let sentence = |name: String| {
        let near = |other: &&&str| (strsim::jaro_winkler(&name, other) * 1e6) as u32;
        let near = known.iter().max_by_key(near).map_or("", |nearest| nearest);
        format!("the variable {name} is ignored: no option has it; the nearest is {near}")
    };
    unknown.into_iter().map(sentence).collect()
}

/// `LD_LIBRARY_PATH`.
pub fn library_path() -> Option<String> {
    variable("LD_LIBRARY_PATH")
}

/// The port: `--port`, else SAGEMAKER_BIND_TO_PORT, else SD_PORT, else the default.
pub(super) fn port(typed: Option<u16>) -> Result<u16, clap::Error> {
    if let Some(port) = typed {
        return Ok(port);
    }
    for name in ["SAGEMAKER_BIND_TO_PORT", "SD_PORT"] {
        if let Some(value) = variable(name) {
            let parsed = value.trim().parse();
            return parsed.map_err(|_| {
                usage(format!("{name}={value} is not a port, a number from 0 to 65535"))
            });
        }
    }
    Ok(DEFAULT_PORT)
}

/// The hub's configuration, from the variables of the Python libraries.
pub(super) fn hub() -> Result<Hub, clap::Error> {
    let home = || variable("HOME").map(|home| Path::new(&home).join(".cache/huggingface"));
    let root = variable("HF_HOME").map(PathBuf::from).or_else(home);
    let cache = variable("HF_HUB_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| root.as_ref().map(|root| root.join("hub")));
    let offline = parsed("HF_HUB_OFFLINE", switch)?;
    let stall_timeout = parsed("HF_HUB_DOWNLOAD_TIMEOUT", min::<1>)?;
    let stall_timeout = stall_timeout.map(|seconds| Duration::from_secs(seconds as u64));
    let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
    Ok(Hub {
        // Without a home directory, as in some containers, the cache is in a temporary directory.
        cache: Cache::new(cache.unwrap_or_else(|| std::env::temp_dir().join("huggingface/hub"))),
        endpoint: endpoint.trim_end_matches('/').to_owned(),
        token: variable("HF_TOKEN"),
        offline: offline.unwrap_or(false),
        stall_timeout: stall_timeout.unwrap_or(STALL_TIMEOUT),
    })
}

/// The value of an environment variable that is no option of clap's, if not empty.
fn parsed<T>(
    name: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, clap::Error> {
    let value = variable(name).map(|value| parse(&value)).transpose();
    value.map_err(|reason| usage(format!("the variable {name} {reason}")))
}

/// An environment variable without the white space around it, if not empty.
fn variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?.trim().to_owned();
    (!value.is_empty()).then_some(value)
}

/// The error of an invalid argument or variable.
pub(super) fn usage(message: impl fmt::Display) -> clap::Error {
    Args::command().error(ErrorKind::ValueValidation, message)
}
/// A file as a request carries it.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, clap::Error> {
    std::fs::read(path).map_err(|error| usage(format!("cannot read {}: {error}", path.display())))
}
