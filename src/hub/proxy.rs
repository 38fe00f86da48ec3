//! Which proxy a request goes through, as curl and the hub's own tools read it from the
//! environment.

use std::net::IpAddr;

use ipnet::IpNet;
use ureq::Proxy;
use ureq::http::Uri;

use super::settings::var;
use crate::error::{Error, Result};

/// Proxies by scheme, and the hosts that need none.
#[derive(Default)]
pub(super) struct Proxies {
    http: Option<Named>,
    https: Option<Named>,
    direct: Vec<Direct>,
}

/// A proxy, and how messages call it.
#[derive(Clone)]
pub(super) struct Named {
    pub proxy: Proxy,
    /// `SCHEME://HOST:PORT (VARIABLE)`, without name and password.
    pub name: String,
}

impl Proxies {
    /// Those of `HTTPS_PROXY`, `HTTP_PROXY` and `ALL_PROXY` less `NO_PROXY`, in lower or upper
    /// case.
    ///
    /// Errors: usage, for a value that is no address of a proxy.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(var)
    }

    fn from_lookup(var: impl Fn(&str) -> Result<Option<String>>) -> Result<Self> {
        let first = |names: &[&str]| -> Result<Option<(String, String)>> {
            for name in names {
                for name in [name.to_lowercase(), name.to_string()] {
                    if let Some(value) = var(&name)? {
                        return Ok(Some((name, value)));
                    }
                }
            }
            Ok(None)
        };
        let proxy = |names: &[&str]| first(names)?.map(|(name, value)| Named::parse(&name, &value)).transpose();
        let direct = first(&["NO_PROXY"])?
            .map_or_else(Vec::new, |(_, list)| list.split([',', ' ', '\t', '\n']).filter_map(Direct::parse).collect());
        let http = proxy(&["HTTP_PROXY", "ALL_PROXY"])?;
        Ok(Self { http, https: proxy(&["HTTPS_PROXY", "ALL_PROXY"])?, direct })
    }

    /// The proxy of a request, if it needs one.
    pub fn of(&self, uri: &Uri) -> Option<&Named> {
        let https = uri.scheme_str() == Some("https");
        let proxy = if https { self.https.as_ref() } else { self.http.as_ref() }?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_lowercase();
        let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        (!self.direct.iter().any(|d| d.matches(host.trim_end_matches('.'), port))).then_some(proxy)
    }
}

impl Named {
    fn parse(variable: &str, value: &str) -> Result<Self> {
        let value = value.trim();
        let (scheme, rest) = value.split_once("://").unwrap_or(("http", value));
        let refuse = |what: &str| {
            Error::usage(format!("{variable} {what}")).hint(format!(
                "{variable}=http://HOST:PORT, or with https, socks4, socks5 or socks5h; NO_PROXY=HOST for hosts without one"
            ))
        };
        let scheme = scheme.to_lowercase();
        if !["http", "https", "socks", "socks4", "socks4a", "socks5", "socks5h"].contains(&scheme.as_str()) {
            return Err(refuse(&format!("names a proxy of the unknown kind {scheme}")));
        }
        // The library's error may contain the address, with its password; this one does not.
        let proxy = Proxy::new(&format!("{scheme}://{}", rest.trim_end_matches('/')));
        let proxy = proxy.map_err(|_| refuse("is not the address of a proxy"))?;
        if proxy.host().is_empty() {
            return Err(refuse("is not the address of a proxy"));
        }
        let name = format!("{scheme}://{}:{} ({variable})", proxy.host(), proxy.port());
        Ok(Self { proxy, name })
    }
}

/// Hosts that are reached without a proxy.
#[derive(Debug, PartialEq)]
enum Direct {
    All,
    /// Addresses, and the one port if there is one.
    Net(IpNet, Option<u16>),
    /// A host and all below it, and the one port if there is one.
    Domain(String, Option<u16>),
}

impl Direct {
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim();
        if entry == "*" {
            return Some(Self::All);
        }
        let net = |text: &str| {
            let text = text.trim_matches(['[', ']']);
            text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
        };
        if let Some(net) = net(entry) {
            return Some(Self::Net(net, None));
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry, None),
        };
        if let Some(net) = net(host) {
            return Some(Self::Net(net, port));
        }
        let domain = host.trim_start_matches('*').trim_matches('.').to_lowercase();
        (!domain.is_empty()).then_some(Self::Domain(domain, port))
    }

    fn matches(&self, host: &str, port: u16) -> bool {
        let at = |only: &Option<u16>| only.is_none_or(|p| p == port);
        match self {
            Self::All => true,
            Self::Net(net, only) => at(only) && host.parse::<IpAddr>().is_ok_and(|a| net.contains(&a)),
            Self::Domain(domain, only) => {
                let below = || host.strip_suffix(domain.as_str()).is_some_and(|h| h.ends_with('.'));
                at(only) && (host == domain || below())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(set: &[(&str, &str)]) -> Result<Proxies> {
        Proxies::from_lookup(|name| Ok(set.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string())))
    }

    fn of(set: &[(&str, &str)], uri: &str) -> Option<String> {
        proxies(set).unwrap().of(&uri.parse().unwrap()).map(|p| p.name.clone())
    }

    #[test]
    fn the_scheme_chooses_the_proxy() {
        let set = [("https_proxy", "http://a:1"), ("HTTPS_PROXY", "http://b:1"), ("ALL_PROXY", "socks5h://me:pw@c")];
        assert_eq!(of(&set, "https://huggingface.co/x").unwrap(), "http://a:1 (https_proxy)");
        assert_eq!(of(&set, "http://huggingface.co/x").unwrap(), "socks5h://c:1080 (ALL_PROXY)");
        assert_eq!(of(&[("HTTP_PROXY", "proxy:3128/")], "http://a/").unwrap(), "http://proxy:3128 (HTTP_PROXY)");
        assert_eq!(of(&[("HTTP_PROXY", "http://a")], "https://a/"), None);
        for bad in ["ftp://me:secret@a", "http://me:sec ret@a", "http://", "http://me:secret@", "::secret"] {
            let e = proxies(&[("HTTPS_PROXY", bad)]).map(|_| ()).unwrap_err();
            assert!(e.exit_code() == 2 && !e.message.contains("sec"), "{}", e.message);
        }
    }

    #[test]
    fn some_hosts_need_no_proxy() {
        let direct = |list: &str, uri: &str| of(&[("all_proxy", "http://p:1"), ("no_proxy", list)], uri).is_none();
        for (list, uri) in [
            ("*", "http://any/"),
            ("a.org, corp.com", "https://hub.corp.com/"),
            ("corp.com", "https://CORP.com/"),
            (".corp.com", "https://hub.corp.com/"),
            (".corp.com", "https://corp.com/"),
            ("*.corp.com", "https://hub.corp.com/"),
            ("10.0.0.0/8", "http://10.20.30.40:8080/"),
            ("10.1.2.3", "http://10.1.2.3/"),
            ("fd00::/8", "http://[fd12::1]:8080/"),
            ("[::1]", "http://[::1]/"),
            ("corp.com:8443", "https://corp.com:8443/"),
            ("corp.com:443", "https://corp.com/"),
            ("127.0.0.1:8765", "http://127.0.0.1:8765/"),
            ("[::1]:81", "http://[::1]:81/"),
            ("localhost 127.0.0.0/8", "http://127.9.9.9/"),
        ] {
            assert!(direct(list, uri), "{list} {uri}");
        }
        for (list, uri) in [
            ("", "http://any/"),
            ("corp.com", "https://notcorp.com/"),
            ("corp.com", "https://corp.com.evil.org/"),
            ("10.0.0.0/8", "http://11.0.0.1/"),
            ("10.0.0.0/8", "http://10.example.org/"),
            ("corp.com:8443", "https://corp.com/"),
            ("127.0.0.1:1", "http://127.0.0.1:2/"),
        ] {
            assert!(!direct(list, uri), "{list} {uri}");
        }
    }
}
