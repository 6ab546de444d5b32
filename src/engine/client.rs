//! Whose a job is, and its order among the jobs of its client.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

/// The client of a job, for fair queueing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Client(Arc<str>);

impl Client {
    /// A client with a name, such as an API key.
    pub fn named(name: &str) -> Self {
        Self(name.into())
    }

    /// The name, or the address as text.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A client identified by its address. IPv6 addresses count by /64, the network of one
    /// subscriber.
    pub fn at(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(address.to_string().into()),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self(format!("{a:x}:{b:x}:{c:x}:{d:x}").into())
            }
        }
    }
}

/// The order of a job among the jobs of its own client. Other clients are not affected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// After the client's other jobs.
    Low,
    /// In the order of arrival.
    #[default]
    Normal,
    /// Before the client's other jobs that have not started.
    High,
}

impl Priority {
    /// The name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }
}

impl FromStr for Priority {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let all = [Self::Low, Self::Normal, Self::High];
        all.into_iter().find(|one| one.name() == name).ok_or("must be low, normal or high")
    }
}
