//! Random ids and seeds.

use super::error::{ApiError, Result};

/// An id that cannot be guessed.
pub(crate) fn random() -> Result<u128> {
    Ok(u128::from(checked(getrandom::u64())?) << 64 | u128::from(checked(getrandom::u64())?))
}

/// A short id, to find a request in the log by.
pub(crate) fn short() -> Result<u64> {
    checked(getrandom::u64())
}

/// A seed of 32 bits, so that clients that read numbers as doubles can repeat it.
pub(crate) fn seed() -> Result<u64> {
    checked(getrandom::u32()).map(u64::from)
}

/// Equal ids would hand one client's images to another, so a failure is an error.
fn checked<T>(drawn: std::result::Result<T, getrandom::Error>) -> Result<T> {
    drawn.map_err(ApiError::Random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_of_the_system_is_an_error() {
        let error = checked::<u64>(Err(getrandom::Error::UNSUPPORTED)).expect_err("an error");
        let message = error.to_string();
        assert_eq!((error.status().as_u16(), &*error.reason().code), (500, "random_failed"));
        assert!(message.starts_with("the system provides no random numbers: "), "{message}");
    }
}
