//! The options of access.

use std::fmt;
use std::str::FromStr;

use axum::http::HeaderValue;
use ring::digest::{SHA256, digest};
use url::Host;

use super::address::{AllowedHost, Authority, BaseUrl, WebOrigin};
use super::proxies::TrustedProxies;
use crate::engine::Client;
use crate::options::switch;

/// Who may do what, which is options of `serve`.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Access")]
pub struct AccessConfig {
    /// API keys, comma-separated. With any, these routes return 401 without one: /v1/*, /sdapi/*,
    /// /controlnet/*, /internal/progress, POST / and POST /models/{name} (outside multi-model mode). All others,
    /// including the web page, /invocations and /metrics, are public, because SageMaker
    /// authenticates callers itself: do not expose them on a public network
    #[arg(long = "api-key", env = "SD_API_KEY", hide_env_values = true)]
    #[arg(value_delimiter = ',')]
    pub api_keys: Vec<ApiKey>,
    /// Require an API key for SageMaker's routes, too: /invocations, and in multi-model mode all
    /// routes below /models. Not for use on SageMaker, which forwards no key
    #[arg(long, env = "SD_LOCK_INVOCATIONS", value_parser = switch)]
    pub lock_invocations: bool,
    /// Allowed origins (CORS) such as `https://example.org`, comma-separated, or * for all. Default:
    /// none, so browsers allow requests from the server's own page only
    #[arg(long = "cors-origin", env = "SD_CORS_ORIGIN")]
    #[arg(value_delimiter = ',', value_parser = origin)]
    pub cors_origins: Vec<HeaderValue>,
    /// Address of this server as clients see it through a proxy, such as `https://example.org/sd`.
    /// Links in responses begin with it, and web pages of this origin count as the server's own
    #[arg(long, env = "SD_PUBLIC_URL")]
    pub public_url: Option<BaseUrl>,
    /// Host names, comma-separated, under which web pages may send requests to this server, besides
    /// IP addresses, localhost and the host of --public-url. Any other name could be a web site's
    /// that points to this address (DNS rebinding). Programs may use any name
    #[arg(long, env = "SD_ALLOWED_HOSTS", value_delimiter = ',')]
    pub allowed_hosts: Vec<AllowedHost>,
    /// IP addresses and networks of the proxies whose X-Forwarded-* headers are believed,
    /// comma-separated, or none
    #[arg(long, env = "SD_TRUSTED_PROXIES", default_value = "127.0.0.0/8,::1")]
    pub trusted_proxies: TrustedProxies,
}

impl AccessConfig {
    /// Whether web pages may address this server by this name.
    pub(crate) fn knows(&self, host: &Host) -> bool {
        let public = self.public_url.as_ref().map(|base| base.origin.authority().host());
        let local = match host {
            Host::Ipv4(_) | Host::Ipv6(_) => true,
            Host::Domain(name) => name == "localhost" || name.ends_with(".localhost"),
        };
        local || public == Some(host) || self.allowed_hosts.iter().any(|allowed| allowed.is(host))
    }

    /// Whether pages of this origin, which is the text of a header, may send requests to a server
    /// that they address by one of `own`.
    pub(crate) fn allows(&self, origin: &HeaderValue, own: &[Authority]) -> bool {
        if self.cors_origins.iter().any(|allowed| allowed == "*") {
            return true;
        }
        let Some(origin) = origin.to_str().ok().and_then(WebOrigin::parse) else { return false };
        let public = self.public_url.as_ref().map(|base| base.origin.authority());
        own.iter().chain(public).any(|own| own.same(origin.authority()))
            || self.cors_origins.iter().any(|allowed| *allowed == origin.to_string())
    }
}

/// A web origin as browsers write it, or `*`.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let origin = match text {
        "*" => Some(text.to_owned()),
        _ => WebOrigin::parse(text).map(|origin| origin.to_string()),
    };
    let value = origin.and_then(|origin| HeaderValue::try_from(origin).ok());
    value.ok_or_else(|| "must be * or http(s)://host without a path".into())
}

/// A key of a client, or for webhooks. Its debug output does not contain it.
#[derive(Clone)]
pub struct ApiKey(Box<str>);

impl FromStr for ApiKey {
    type Err = String;

    fn from_str(key: &str) -> Result<Self, String> {
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a key is one or more visible ASCII characters".into());
        }
        Ok(Self(key.into()))
    }
}

impl ApiKey {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The name of the client that has the key: its hash, since the name is stored with jobs. It is
    /// the same in the next process.
    pub(crate) fn client(&self) -> Client {
        let hex = |byte: &u8| format!("{byte:02x}");
        let hash: String = digest(&SHA256, self.as_bytes()).as_ref().iter().map(hex).collect();
        Client::named(&format!("key {hash}"))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}
