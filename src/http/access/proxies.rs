//! The proxies whose forwarded headers are believed.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Networks of proxies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedProxies(Cow<'static, [IpNet]>);

impl TrustedProxies {
    /// No proxy is trusted.
    pub const NONE: Self = Self(Cow::Borrowed(&[]));

    /// Proxies on this host.
    pub const LOOPBACK: Self = Self(Cow::Borrowed(&[
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    ]));

    /// Whether this address is that of a trusted proxy. An IPv4 address in IPv6 notation counts as
    /// the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }
}

impl FromStr for TrustedProxies {
    type Err = String;

    /// Reads addresses and networks, comma-separated, or `none`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "none" {
            return Ok(Self::NONE);
        }
        let network = |text: &str| {
            let address = || text.parse().map(|address: IpAddr| address.to_canonical().into());
            let network = text.parse().or_else(|_| address());
            network.map_err(|_| format!("{text:?} is no IP address or network such as 10.0.0.0/8"))
        };
        let networks: Result<Vec<_>, _> =
            text.split(',').map(|text| network(text.trim())).collect();
        Ok(Self(networks?.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_addresses_and_networks() {
        let proxies: TrustedProxies = "127.0.0.0/8, ::1,10.1.2.3".parse().expect("networks");
        let table = [
            ("127.9.9.9", true),
            ("::ffff:127.0.0.1", true),
            ("::1", true),
            ("10.1.2.3", true),
            ("10.1.2.4", false),
            ("::2", false),
        ];
        for (address, trusted) in table {
            assert_eq!(proxies.contains(address.parse().expect("an address")), trusted);
        }
        assert!(!TrustedProxies::NONE.contains([127, 0, 0, 1].into()));
        assert_eq!("none".parse(), Ok(TrustedProxies::NONE));
        assert_eq!("127.0.0.0/8,::1".parse(), Ok(TrustedProxies::LOOPBACK));
        for wrong in ["", "localhost", "10.0.0.0/33", "10.0.0.1:80", "::1,"] {
            assert!(wrong.parse::<TrustedProxies>().is_err(), "{wrong}");
        }
    }
}
