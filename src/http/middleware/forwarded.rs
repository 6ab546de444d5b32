//! What proxies say about a request: the headers `X-Forwarded-*`. They are removed from requests
//! that no trusted proxy has sent, so that all other code can believe them. RFC 7239's `Forwarded`
//! is not read: a proxy that sets the one kind passes on what its clients send of the other.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::HOST;
use axum::http::{HeaderMap, Uri};
use axum::middleware::Next;
use axum::response::Response;

use crate::http::access::{AccessConfig, Authority, TrustedProxies, prefix};

const FOR: &str = "x-forwarded-for";
const PROTO: &str = "x-forwarded-proto";
const HOST_SEEN: &str = "x-forwarded-host";
const PORT: &str = "x-forwarded-port";
const PREFIX: &str = "x-forwarded-prefix";

/// The address of the client, behind all trusted proxies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClientAddress(pub(crate) IpAddr);

/// Finds the client's address, and removes what must not be believed.
pub(crate) async fn resolve(
    State(access): State<Arc<AccessConfig>>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0.ip());
    let proxies = &access.trusted_proxies;
    if !peer.is_some_and(|peer| proxies.contains(peer)) {
        for name in [FOR, PROTO, HOST_SEEN, PORT, PREFIX] {
            request.headers_mut().remove(name);
        }
    }
    if let Some(peer) = peer {
        let client = client(peer, request.headers(), proxies);
        request.extensions_mut().insert(ClientAddress(client));
    }
    next.run(request).await
}

/// The last address before those of trusted proxies. Each proxy appends the address that it sees, so
/// whatever stands further left is the client's own claim.
fn client(peer: IpAddr, headers: &HeaderMap, proxies: &TrustedProxies) -> IpAddr {
    let lists = headers.get_all(FOR).iter().rev();
    let hops = lists.flat_map(|list| list.as_bytes().rsplit(|byte| *byte == b','));
    let hops = hops.map(<[u8]>::trim_ascii).filter(|hop| !hop.is_empty());
    let mut client = peer.to_canonical();
    for hop in hops {
        let Some(address) = std::str::from_utf8(hop).ok().and_then(address) else { break };
        client = address;
        if !proxies.contains(client) {
            break;
        }
    }
    client
}

/// An address as proxies write it, with or without a port.
fn address(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    let with_port = || hop.parse::<SocketAddr>().ok().map(|address| address.ip());
    bare.parse().ok().or_else(with_port).map(|address: IpAddr| address.to_canonical())
}

/// The host of a request itself; none unless exactly one is given.
pub(crate) fn host(uri: &Uri, headers: &HeaderMap) -> Option<Authority> {
    if let Some(authority) = uri.authority() {
        return Authority::parse(authority.as_str());
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next().filter(|_| hosts.next().is_none())?;
    Authority::parse(host.to_str().ok()?)
}

/// The host of a request as the client sees it.
pub(crate) fn host_seen(uri: &Uri, headers: &HeaderMap) -> Option<Authority> {
    let digits = |port: &&str| port.bytes().all(|byte| byte.is_ascii_digit());
    let port = first(headers, PORT).filter(digits).and_then(|port| port.parse().ok());
    let port = port.filter(|port| *port != 0);
    let forwarded = first(headers, HOST_SEEN).and_then(Authority::parse);
    Some(forwarded.or_else(|| host(uri, headers))?.or_port(port))
}

/// Whether the client uses https.
pub(crate) fn is_secure(headers: &HeaderMap) -> bool {
    first(headers, PROTO).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"))
}

/// The prefix of paths that the client sees.
pub(crate) fn path_prefix(headers: &HeaderMap) -> String {
    first(headers, PREFIX).and_then(prefix).unwrap_or_default()
}

/// The first value of a list: that of the proxy next to the client.
fn first<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    Some(headers.get(name)?.to_str().ok()?.split(',').next()?.trim())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_client_is_who_the_last_trusted_proxy_saw() {
        let proxies = "127.0.0.0/8,::1,10.0.0.0/8".parse().expect("networks");
        let table: [(&[&str], &str); 11] = [
            (&[], "127.0.0.1"),
            (&["1.1.1.1"], "1.1.1.1"),
            (&["6.6.6.6, 1.1.1.1"], "1.1.1.1"),
            (&["6.6.6.6, 1.1.1.1, 10.0.0.9"], "1.1.1.1"),
            (&["6.6.6.6", "1.1.1.1,10.0.0.9,"], "1.1.1.1"),
            (&["10.0.0.8, 10.0.0.9"], "10.0.0.8"),
            (&["1.1.1.1:4711"], "1.1.1.1"),
            (&["[2001:db8::1]:4711"], "2001:db8::1"),
            (&["[2001:db8::1]"], "2001:db8::1"),
            (&["::ffff:1.1.1.1"], "1.1.1.1"),
            (&["1.1.1.1, unknown, 10.0.0.9"], "10.0.0.9"),
        ];
        for (lists, address) in table {
            let mut headers = HeaderMap::new();
            for list in lists {
                headers.append(FOR, HeaderValue::from_str(list).expect("a header"));
            }
            let client = client([127, 0, 0, 1].into(), &headers, &proxies);
            assert_eq!(client.to_string(), address, "{lists:?}");
        }
    }
}
