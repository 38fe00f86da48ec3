//! Requests to the hub and to where it redirects: each runs on its own thread, so that the main
//! thread can announce the wait, give up, or be interrupted.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ureq::http::header::{HeaderMap, LOCATION};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

use super::proxy::Proxies;
use super::settings::{self, Endpoint};
use super::{Event, Observer, tls};
use crate::error::{Error, Kind, Result};

/// How often a wait checks for an interrupt and its deadline.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// Waits that take longer are announced.
const QUIET: Duration = Duration::from_secs(3);
const MAX_REDIRECTS: usize = 10;
/// Bytes that are passed on at a time.
const CHUNK: usize = 1 << 18;

/// A client of one hub.
pub(super) struct Http {
    agent: Agent,
    proxies: Proxies,
    hub: Origin,
    /// The `Authorization` header, sent to the hub itself and nowhere else.
    authorization: Option<String>,
}

/// Scheme, host and port of a server.
#[derive(Debug, PartialEq)]
struct Origin(String, String, u16);

/// An answer without its content.
pub(super) struct Head {
    /// The status code.
    pub status: u16,
    /// Headers of the last answer.
    pub headers: HeaderMap,
    /// Headers of the first answer, the hub's own, which may have been a redirect.
    pub first: HeaderMap,
    /// The server of the last answer: `scheme://host[:port]`.
    pub server: String,
}

/// A piece of an answer.
pub(super) enum Piece {
    Head(Box<Head>),
    Bytes(Vec<u8>),
    End,
}

/// Why no answer came, or not all of it.
#[derive(Debug)]
pub(super) enum Fault {
    /// No connection: another attempt will hardly do better.
    Unreachable(Error),
    /// The answer broke off, or took too long.
    Cut(String),
    /// The observer stopped it.
    Stopped(Error),
}

impl From<Error> for Fault {
    fn from(e: Error) -> Self {
        Self::Stopped(e)
    }
}

/// An answer on its way.
pub(super) struct Answer(Receiver<Result<Piece, Fault>>);

impl Answer {
    /// The next piece, if it comes before `deadline`; `what` is what messages wait for.
    pub fn next(&self, deadline: Instant, what: &str, observer: Observer) -> Result<Piece, Fault> {
        let start = Instant::now();
        loop {
            observer(Event::Tick)?;
            let waited = start.elapsed();
            if Instant::now() >= deadline {
                return Err(Fault::Cut(format!("nothing came for {:.0} s", waited.as_secs_f64())));
            }
            if waited >= QUIET {
                observer(Event::Status(&format!("waiting for {what}")))?;
            }
            match self.0.recv_timeout(TICK) {
                Ok(piece) => return piece,
                Err(RecvTimeoutError::Disconnected) => return Err(Fault::Cut("the request ended early".into())),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The head, which comes first.
    pub fn head(&self, deadline: Instant, what: &str, observer: Observer) -> Result<Head, Fault> {
        match self.next(deadline, what, observer)? {
            Piece::Head(head) => Ok(*head),
            _ => Err(Fault::Cut("the answer has no head".into())),
        }
    }
}

impl Http {
    /// For the hub at `endpoint`, with the environment's proxies and certificates.
    ///
    /// Errors: usage, for variables that cannot be understood.
    pub fn new(endpoint: &Endpoint, token: Option<&str>) -> Result<Arc<Self>> {
        let uri: Uri = endpoint.url.parse().map_err(|_| Error::usage("HF_ENDPOINT is not the address of a hub"))?;
        // The main thread's deadlines come first; this ends threads that it has given up.
        let long = settings::list_timeout().max(settings::stall_timeout()) * 2;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(long))
            .timeout_per_read(Some(long))
            .accept_encoding("identity")
            .user_agent(concat!("nextflow/", env!("CARGO_PKG_VERSION")));
        match tls::config() {
            Ok(tls) => config = config.tls_config(tls),
            Err(e) if uri.scheme_str() == Some("https") => return Err(e),
            Err(_) => {}
        }
        let authorization = match (&endpoint.login, token) {
            (Some(login), _) => Some(format!("Basic {}", BASE64_STANDARD.encode(login))),
            (None, token) => token.map(|t| format!("Bearer {t}")),
        };
        let agent = Agent::new_with_config(config.build());
        Ok(Arc::new(Self { agent, proxies: Proxies::from_env()?, hub: Origin::of(&uri), authorization }))
    }

    /// Requests `url` from byte `from` on.
    ///
    /// Errors: [`Kind::Failure`] if the process may have no more threads.
    pub fn get(self: &Arc<Self>, url: String, from: u64) -> Result<Answer> {
        let (sender, receiver) = mpsc::sync_channel(8);
        let this = self.clone();
        let work = move || {
            // A closed channel is no error: the main thread has given up.
            if let Err(fault) = this.run(&url, from, &sender) {
                let _ = sender.send(Err(fault));
            }
        };
        std::thread::Builder::new().name("download".into()).spawn(work).map_err(|e| {
            Error::new(Kind::Failure, format!("no thread can be started for a download: {e}"))
                .hint("ulimit -u shows how many processes and threads this user may have")
        })?;
        Ok(Answer(receiver))
    }

    fn run(&self, url: &str, from: u64, sender: &SyncSender<Result<Piece, Fault>>) -> Result<(), Fault> {
        let bad = |text: &str| {
            Fault::Unreachable(
                Error::model(format!("the hub redirects to {text:?}, which is not an address"))
                    .hint("HF_ENDPOINT=URL names another hub"),
            )
        };
        let mut uri: Uri = url.parse().map_err(|_| bad(url))?;
        let mut first = None;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.call(&uri, from)?;
            let first = first.get_or_insert_with(|| response.headers().clone());
            let to = response.headers().get(LOCATION).map(|l| l.as_bytes().to_vec());
            match (response.status().as_u16(), to) {
                (301..=303 | 307 | 308, Some(to)) => uri = join(&uri, &to).ok_or_else(|| bad(url))?,
                _ => {
                    let head = Head {
                        status: response.status().as_u16(),
                        headers: response.headers().clone(),
                        first: std::mem::take(first),
                        server: server(&uri),
                    };
                    return pass_on(response, head, sender);
                }
            }
        }
        Err(Fault::Unreachable(
            Error::model(format!("{} redirects more than {MAX_REDIRECTS} times", server(&uri)))
                .hint("HF_ENDPOINT=URL names another hub"),
        ))
    }

    fn call(&self, uri: &Uri, from: u64) -> Result<Response<Body>, Fault> {
        let proxy = self.proxies.of(uri);
        let mut request = self.agent.get(uri);
        if let Some(authorization) = self.authorization.as_ref().filter(|_| Origin::of(uri) == self.hub) {
            request = request.header("Authorization", authorization);
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let result = match proxy {
            Some(named) => request.config().proxy(Some(named.proxy.clone())).build().call(),
            None => request.call(),
        };
        result.map_err(|e| fault(&server(uri), proxy.map(|p| p.name.as_str()), e))
    }
}

/// Sends the head and then the content, until the channel is closed.
fn pass_on(response: Response<Body>, head: Head, sender: &SyncSender<Result<Piece, Fault>>) -> Result<(), Fault> {
    if sender.send(Ok(Piece::Head(Box::new(head)))).is_err() {
        return Ok(());
    }
    let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
    loop {
        let mut bytes = vec![0; CHUNK];
        let piece = match body.read(&mut bytes) {
            Ok(0) => Piece::End,
            Ok(n) => {
                bytes.truncate(n);
                Piece::Bytes(bytes)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Fault::Cut(e.to_string())),
        };
        let last = matches!(piece, Piece::End);
        if sender.send(Ok(piece)).is_err() || last {
            return Ok(());
        }
    }
}

/// What an error of a request means.
fn fault(server: &str, proxy: Option<&str>, e: ureq::Error) -> Fault {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
    let text = e.to_string();
    let text = text.strip_prefix("io: ").unwrap_or(&text);
    let certificate = text.contains("certificate");
    match &e {
        ureq::Error::Io(io)
            if matches!(
                io.kind(),
                BrokenPipe | ConnectionAborted | ConnectionReset | TimedOut | UnexpectedEof | WouldBlock
            ) && !certificate =>
        {
            return Fault::Cut(text.into());
        }
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {}
        ureq::Error::Timeout(_) | ureq::Error::BodyStalled => return Fault::Cut(text.into()),
        ureq::Error::Protocol(_) => {
            return Fault::Unreachable(
                Error::model(format!("{server} does not answer in HTTP: {text}"))
                    .hint("HF_ENDPOINT=URL names another hub")
                    .because(e),
            );
        }
        _ => {}
    }
    let through = proxy.map_or_else(String::new, |name| format!(" through the proxy {name}"));
    let error = Error::new(Kind::Failure, format!("{server} cannot be reached{through}: {text}")).because(e);
    Fault::Unreachable(match proxy {
        _ if certificate && text.contains("Expired") => error.hint("check this machine's clock: date"),
        _ if certificate => error.hint(tls::HINT),
        Some(_) if text.contains("407") => error.hint("HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT nextflow ..."),
        Some(_) => error.hint("check the proxy's address, or NO_PROXY=HOST nextflow ... to go without it"),
        None => error.hint(
            "HF_ENDPOINT=URL names another hub, HTTPS_PROXY=http://HOST:PORT a proxy; with --offline a model of the cache \
             needs neither",
        ),
    })
}

impl Origin {
    fn of(uri: &Uri) -> Self {
        let scheme = uri.scheme_str().unwrap_or_default().to_lowercase();
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Self(scheme, uri.host().unwrap_or_default().to_lowercase(), port)
    }
}

/// `scheme://host[:port]`, without a name or a password.
fn server(uri: &Uri) -> String {
    let port = uri.port_u16().map_or_else(String::new, |port| format!(":{port}"));
    format!("{}://{}{port}", uri.scheme_str().unwrap_or_default(), uri.host().unwrap_or_default())
}

/// Where `Location: to` leads from `uri`.
fn join(uri: &Uri, to: &[u8]) -> Option<Uri> {
    // Raw spaces and letters beyond ASCII are not allowed there, and yet seen.
    let to: String = to
        .iter()
        .map(|&b| if b.is_ascii_graphic() { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect();
    let to = to.trim_start_matches("%20").split('#').next().unwrap_or_default();
    let (scheme, authority) = (uri.scheme_str()?, uri.authority()?);
    let base = uri.path();
    let joined = match to {
        "" => return None,
        _ if to.starts_with("//") => format!("{scheme}:{to}"),
        _ if to.starts_with('/') => format!("{scheme}://{authority}{to}"),
        _ if to.starts_with('?') => format!("{scheme}://{authority}{base}{to}"),
        _ if to.split(['/', '?']).next().is_some_and(|first| first.contains(':')) => to.into(),
        _ => format!("{scheme}://{authority}{}", without_dots(&base[..=base.rfind('/')?], to)),
    };
    joined.parse().ok().filter(|u: &Uri| matches!(u.scheme_str(), Some("http" | "https")) && u.host().is_some())
}

/// The path `folder` + `to` after its steps `.` and `..`.
fn without_dots(folder: &str, to: &str) -> String {
    let (path, query) = to.find('?').map_or((to, ""), |at| to.split_at(at));
    let mut parts: Vec<&str> = folder.trim_matches('/').split('/').filter(|p| !p.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}{query}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_joined() {
        let from: Uri = "http://hub:81/o/m/resolve/c/w?x=1".parse().unwrap();
        for (to, whole) in [
            ("https://cdn.org/a?b=c#d", "https://cdn.org/a?b=c"),
            ("//cdn.org/a", "http://cdn.org/a"),
            ("/cached/w", "http://hub:81/cached/w"),
            ("w2?y", "http://hub:81/o/m/resolve/c/w2?y"),
            ("../d/./w", "http://hub:81/o/m/resolve/d/w"),
            ("../../../../../../w", "http://hub:81/w"),
            ("?y=2", "http://hub:81/o/m/resolve/c/w?y=2"),
            ("/a b/é", "http://hub:81/a%20b/%C3%A9"),
        ] {
            assert_eq!(join(&from, to.as_bytes()).unwrap().to_string(), whole, "{to}");
        }
        for bad in ["", "file:///etc/passwd", "ftp://a/b", "javascript:alert(1)", "http://"] {
            assert!(join(&from, bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let of = |uri: &str| Origin::of(&uri.parse().unwrap());
        assert_eq!(of("https://Hub.co/a"), of("https://hub.co:443/b"));
        for other in ["http://hub.co/", "https://hub.co:444/", "https://www.hub.co/", "http://hub.co:443/"] {
            assert_ne!(of("https://hub.co/"), of(other), "{other}");
        }
        assert_eq!(server(&"https://me:secret@hub.co:1/x".parse().unwrap()), "https://hub.co:1");
    }
}
