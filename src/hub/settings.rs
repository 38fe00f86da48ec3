//! The variables that the hub's own tools read: endpoint, token, cache folder, timeouts.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// The public hub.
const PUBLIC: &str = "https://huggingface.co";

/// The value of a variable that is set to more than nothing.
///
/// Errors: usage, for one that is not UTF-8.
pub(super) fn var(name: &str) -> Result<Option<String>> {
    match env::var(name) {
        Ok(value) => Ok(Some(value).filter(|v| !v.trim().is_empty())),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => {
            Err(Error::usage(format!("{name} is not UTF-8")).hint(format!("unset {name}")))
        }
    }
}

/// The address in `HF_ENDPOINT`, if there is one, without name and password.
pub(super) fn endpoint_address() -> Option<String> {
    var("HF_ENDPOINT").ok().flatten().and_then(|e| Endpoint::parse(&e).ok()).map(|e| e.url)
}

/// The address of a hub, and the name and password in it if there are any.
pub(super) struct Endpoint {
    /// `scheme://host[:port][/path]`, without a slash at its end.
    pub url: String,
    /// `USER:PASSWORD`.
    pub login: Option<String>,
}

impl Endpoint {
    /// The hub of `HF_ENDPOINT`, or the public one.
    ///
    /// Errors: usage, for a bad address.
    pub fn from_env() -> Result<Self> {
        match var("HF_ENDPOINT")? {
            Some(address) => Self::parse(&address),
            None => Ok(Self { url: PUBLIC.into(), login: None }),
        }
    }

    /// Errors: usage, for a bad address. The message does not repeat it: it may hold a password.
    pub fn parse(address: &str) -> Result<Self> {
        let bad = |hint: &str| Error::usage("HF_ENDPOINT is not the address of a hub").hint(hint);
        let address = address.trim().trim_end_matches('/');
        let Some((scheme, rest)) = address.split_once("://") else {
            let host = address.rsplit('@').next().unwrap_or_default();
            return Err(bad(&format!("HF_ENDPOINT=https://{host}")));
        };
        let scheme = scheme.to_ascii_lowercase();
        let usual = format!("HF_ENDPOINT={PUBLIC}");
        let end = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (login, host) = match authority.rsplit_once('@') {
            Some((login, host)) => (Some(login), host),
            None => (None, authority),
        };
        let url = format!("{scheme}://{host}{path}");
        let whole = url.parse::<ureq::http::Uri>().is_ok_and(|u| u.host().is_some_and(|h| !h.is_empty()));
        if !matches!(scheme.as_str(), "http" | "https") || path.contains(['?', '#']) || !whole {
            return Err(bad(&usual));
        }
        Ok(Self { url, login: login.map(percent_decoded) })
    }
}

/// Decodes the %XX of a part of an address. The result is checked by the caller.
pub(super) fn percent_decoded(part: &str) -> String {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let [first, after @ ..] = rest {
        let hex = after.get(..2).and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `HF_HOME`, or `huggingface` in the folder for caches; none if there is no home folder.
fn home() -> Result<Option<PathBuf>> {
    if let Some(home) = folder("HF_HOME")? {
        return Ok(Some(home));
    }
    let cache = match folder("XDG_CACHE_HOME")? {
        Some(cache) => Some(cache),
        None => user_home().map(|home| home.join(".cache")),
    };
    Ok(cache.map(|cache| cache.join("huggingface")))
}

fn user_home() -> Option<PathBuf> {
    let var = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HOME").or_else(|| var("USERPROFILE"))
}

/// The folder of the cache: `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, or `hub` in `HF_HOME`.
///
/// Errors: usage, if there is no home folder, or a variable cannot be understood.
pub(super) fn cache_folder() -> Result<PathBuf> {
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        if let Some(folder) = folder(name)? {
            return Ok(folder);
        }
    }
    let home = home()?;
    home.map(|home| home.join("hub"))
        .ok_or_else(|| Error::usage("there is no home folder").hint("HF_HOME=FOLDER nextflow ..."))
}

/// The folder in a variable, with `~` and `$NAME` replaced as the hub's own tools do.
fn folder(name: &str) -> Result<Option<PathBuf>> {
    let Some(value) = env::var_os(name).filter(|v| !v.is_empty()) else { return Ok(None) };
    // A path that is not UTF-8 is taken as it is.
    let Some(text) = value.to_str() else { return Ok(Some(value.into())) };
    expand(text, user_home().as_deref(), |name| env::var(name).ok()).map(Some).ok_or_else(|| {
        Error::usage(format!("{name}={text} names another user's home folder, which is not looked up"))
            .hint(format!("{name}=/FOLDER, in full"))
    })
}

/// `text` with a leading `~` and each `$NAME` or `${NAME}` that is set replaced; none for `~NAME`.
fn expand(text: &str, home: Option<&Path>, lookup: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    match text.strip_prefix('~') {
        None => Some(expand_variables(text, lookup).into()),
        Some("") => home.map(Path::to_path_buf),
        Some(below) => Some(home?.join(expand_variables(below.strip_prefix('/')?.trim_start_matches('/'), lookup))),
    }
}

fn expand_variables(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out += &rest[..at];
        let after = &rest[at + 1..];
        let (name, length) = match after.strip_prefix('{').and_then(|a| a.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        match lookup(name).filter(|_| !name.is_empty()) {
            Some(value) => out += &value,
            None => out += &rest[at..at + 1 + length],
        }
        rest = &after[length..];
    }
    out + rest
}

/// The token: `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, the file `HF_TOKEN_PATH`, or `token` in
/// `HF_HOME`, where `hf auth login` stores it.
///
/// Errors: usage, for a malformed token. The message does not repeat it.
pub(super) fn token() -> Result<Option<String>> {
    if var("HF_HUB_DISABLE_IMPLICIT_TOKEN")?.is_some_and(|v| matches!(&*v.to_uppercase(), "1" | "ON" | "YES" | "TRUE"))
    {
        return Ok(None);
    }
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(token) = var(name)? {
            return check_token(&token, name).map(Some);
        }
    }
    if let Some(path) = folder("HF_TOKEN_PATH")? {
        return match std::fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => Ok(None),
            Ok(text) => check_token(&text, &path.display().to_string()).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::new(Kind::Failure, format!("the token in {} cannot be read: {e}", path.display()))
                .hint("HF_TOKEN=... nextflow ...")),
        };
    }
    let Some(home) = home()? else { return Ok(None) };
    let cache = hf_hub::Cache::new(home.join("hub"));
    cache.token().map(|token| check_token(&token, &cache.token_path().display().to_string())).transpose()
}

fn check_token(token: &str, origin: &str) -> Result<String> {
    let token: String = token.trim().chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    let what = match token.chars().find(|c| !c.is_ascii_graphic()) {
        None => return Ok(token),
        Some(' ' | '\t') => "a space",
        Some(_) => "a character that is not visible ASCII",
    };
    Err(Error::usage(format!("{origin} does not hold a token: there is {what} in it"))
        .hint("a token is one word that starts with hf_: hf auth login, or HF_TOKEN=hf_... nextflow ..."))
}

/// How long a list of files may take as a whole.
pub(super) fn list_timeout() -> Duration {
    seconds("HF_HUB_ETAG_TIMEOUT")
}

/// How long a file may bring next to nothing.
pub(super) fn stall_timeout() -> Duration {
    seconds("HF_HUB_DOWNLOAD_TIMEOUT")
}

/// A minute, or the value of a variable of the hub's own tools. They default to 10 s, less than
/// busy mirrors need.
fn seconds(name: &str) -> Duration {
    let set =
        var(name).ok().flatten().and_then(|v| v.trim().parse::<f64>().ok()).filter(|s| (0.1..=86_400.0).contains(s));
    Duration::from_secs_f64(set.unwrap_or(60.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_expanded_as_the_hubs_own_tools_do() {
        let lookup = |name: &str| match name {
            "SCRATCH" => Some("/scratch/me".to_string()),
            _ => None,
        };
        let home = Path::new("/home/me");
        for (text, path) in [
            ("/a/b", "/a/b"),
            ("~", "/home/me"),
            ("~/h", "/home/me/h"),
            ("$SCRATCH/hf", "/scratch/me/hf"),
            ("${SCRATCH}hf/$SCRATCH", "/scratch/mehf//scratch/me"),
            ("$NOT_SET/${NOR_THIS}/$", "$NOT_SET/${NOR_THIS}/$"),
            ("a/~", "a/~"),
            ("~/x$SCRATCH", "/home/me/x/scratch/me"),
            ("${SCRATCH", "${SCRATCH"),
        ] {
            assert_eq!(expand(text, Some(home), lookup).as_deref(), Some(Path::new(path)), "{text}");
        }
        assert_eq!(expand("~bob/h", Some(home), lookup), None);
        assert_eq!(expand("~/h", None, lookup), None);
    }

    #[test]
    fn tokens_are_one_visible_word() {
        assert_eq!(check_token(" hf_x\r\n", "HF_TOKEN").unwrap(), "hf_x");
        for bad in ["hf x", "hf_\u{e9}", "hf_\u{1b}[31m", "Bearer hf_x"] {
            let e = check_token(bad, "HF_TOKEN").unwrap_err();
            assert!(e.exit_code() == 2 && !e.message.contains(bad), "{}", e.message);
        }
    }

    #[test]
    fn endpoints_hide_their_password() {
        let endpoint = Endpoint::parse("HTTPS://me:p%40ss@mirror.corp:8443/hub/").unwrap();
        assert_eq!(endpoint.url, "https://mirror.corp:8443/hub");
        assert_eq!(endpoint.login.as_deref(), Some("me:p@ss"));
        for bad in
            ["mirror.corp", "me:secret@mirror.corp", "ftp://me:secret@a", "https://", "https://a b", "https:///x"]
        {
            let e = Endpoint::parse(bad).map(|_| ()).unwrap_err();
            assert!(e.exit_code() == 2 && !format!("{e}{:?}", e.hint).contains("secret"), "{bad}");
        }
    }
}
