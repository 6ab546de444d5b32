//! Hosts with ports, as in `Host`; web origins, as in `Origin`; and the address of this server as
//! clients see it. Host names are compared as browsers do: in lower case, in ASCII, without a final
//! dot.

use std::fmt;
use std::str::FromStr;

use url::Host;

/// A host with a port, if one is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Authority {
    host: Host,
    port: Option<u16>,
}

impl Authority {
    /// None if the text has anything else than a host and a port.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (host, port) = match text.rfind(':') {
            Some(colon) if !text.ends_with(']') => (&text[..colon], &text[colon + 1..]),
            _ => (text, ""),
        };
        // An empty port counts as none (RFC 3986, 3.2.3). `parse` alone would accept a sign.
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = match port {
            "" => None,
            port => Some(port.parse().ok().filter(|_| digits)?),
        };
        Some(Self { host: parse_host(host)?, port })
    }

    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Sets a port that none was given for.
    pub(crate) fn or_port(mut self, port: Option<u16>) -> Self {
        self.port = self.port.or(port);
        self
    }

    /// Whether both are the same place, under either scheme: the default ports of http and https
    /// count as no port.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let port = |port: Option<u16>| port.filter(|port| ![80, 443].contains(port));
        self.host == other.host && port(self.port) == port(other.port)
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.host),
            None => self.host.fmt(f),
        }
    }
}

/// A name has the characters of DNS and the underscore of container networks: no list of names is one.
fn parse_host(text: &str) -> Option<Host> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let host = Host::parse(text.strip_suffix('.').unwrap_or(text)).ok()?;
    let fit = !matches!(&host, Host::Domain(name) if !name.bytes().all(plain));
    fit.then_some(host)
}

/// An origin of web pages: scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WebOrigin {
    secure: bool,
    authority: Authority,
}

impl WebOrigin {
    /// The default port of the scheme is the same as none.
    pub(crate) fn new(secure: bool, mut authority: Authority) -> Self {
        let default = if secure { 443 } else { 80 };
        authority.port = authority.port.filter(|port| *port != default);
        Self { secure, authority }
    }

    /// None unless the text is `http(s)://host[:port]`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let secure = scheme.eq_ignore_ascii_case("https");
        let known = secure || scheme.eq_ignore_ascii_case("http");
        Authority::parse(authority).filter(|_| known).map(|authority| Self::new(secure, authority))
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }
}

impl fmt::Display for WebOrigin {
    /// As browsers write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.authority)
    }
}

/// The address of this server as clients see it: an origin and the prefix of its paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    pub(crate) origin: WebOrigin,
    /// Empty, or a path without a final `/`.
    pub(crate) prefix: String,
}

impl FromStr for BaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let host = text.find("://").map_or(0, |scheme| scheme + 3);
        let path = text[host..].find('/').map_or(text.len(), |path| host + path);
        let base = || {
            let origin = WebOrigin::parse(&text[..path])?;
            Some(Self { origin, prefix: prefix(&text[path..])? })
        };
        base().ok_or("must be http(s)://host, with a port and a path prefix if there are any")
    }
}

/// A path that stands before all paths of this server, without its final `/`. None if it is no
/// absolute path.
pub(crate) fn prefix(text: &str) -> Option<String> {
    let path = text.strip_suffix('/').unwrap_or(text);
    let parts = path.strip_prefix('/').map(|path| path.split('/'));
    let fit = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        !["", ".", ".."].contains(&part) && part.bytes().all(plain)
    };
    let sound = path.is_empty() || parts.is_some_and(|mut parts| parts.all(fit));
    sound.then(|| path.to_owned())
}

/// A host name or IP address without a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost(Host);

impl AllowedHost {
    pub(crate) fn is(&self, host: &Host) -> bool {
        self.0 == *host
    }
}

impl FromStr for AllowedHost {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        parse_host(text).map(Self).ok_or("must be a host name or IP address, without a port")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_compared_as_browsers_do() {
        let table = [
            ("example.org", "EXAMPLE.org.:443", true),
            ("example.org:80", "example.org:443", true),
            ("example.org:", "example.org", true),
            ("example.org:8080", "example.org", false),
            ("example.org", "www.example.org", false),
            ("[::1]:8080", "[0:0:0:0:0:0:0:1]:8080", true),
            ("[::1]", "[::1]:80", true),
            ("[::1]:1", "127.0.0.1:1", false),
            ("my_host:8080", "My_Host:8080", true),
        ];
        for (one, other, same) in table {
            let parse = |text| Authority::parse(text).expect(text);
            assert_eq!(parse(one).same(&parse(other)), same, "{one} {other}");
        }
        for none in
            ["", ".", ":80", "a b", "a/b", "a@b", "::1", "a:+1", "a:1:2", "a:65536", "a,b", "[::1"]
        {
            assert_eq!(Authority::parse(none), None, "{none}");
        }
    }

    #[test]
    fn addresses_of_this_server_have_an_origin_and_a_prefix() {
        let table = [
            ("https://example.org", "https://example.org", ""),
            ("HTTPS://Example.org:443/", "https://example.org", ""),
            ("http://[::1]:8080/sd/v2/", "http://[::1]:8080", "/sd/v2"),
            ("https://example.org:80/sd", "https://example.org:80", "/sd"),
        ];
        for (text, origin, prefix) in table {
            let base: BaseUrl = text.parse().expect(text);
            assert_eq!((base.origin.to_string().as_str(), &*base.prefix), (origin, prefix));
        }
        for none in [
            "",
            "example.org",
            "ftp://example.org",
            "http://",
            "http:///a",
            "http://a@b",
            "http://a?b",
            "http://a/#b",
            "http://a//b",
            "http://a/../b",
            "http://a/b c",
        ] {
            assert!(none.parse::<BaseUrl>().is_err(), "{none}");
        }
    }
}
