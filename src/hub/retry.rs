//! Servers that have no answer yet: whether to ask them again, and when.

use std::time::{Duration, Instant, SystemTime};

use super::http::{Head, TICK};
use super::{Event, Id, Observer};
use crate::error::{Error, Kind, Result};

/// Most attempts in a row that bring nothing new.
const ATTEMPTS: u32 = 5;
/// The longest that a server may ask to wait before an attempt.
const MAX_WAIT: Duration = Duration::from_secs(300);

/// Whether a server may answer later, and when to retry.
pub(super) fn wait_for(head: &Head) -> Option<Option<Duration>> {
    if !matches!(head.status, 408 | 425 | 429 | 500 | 502 | 503 | 504) {
        return None;
    }
    let header = |name: &str| head.headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim);
    // Seconds, or the time of day; the hub itself sends the seconds left in RateLimit:
    // "api";r=0;t=55.
    let retry = header("retry-after").and_then(|v| match v.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => {
            let at = httpdate::parse_http_date(v).ok()?;
            Some(at.duration_since(SystemTime::now()).unwrap_or_default())
        }
    });
    let limit = || {
        let left = header("ratelimit")?.split(';').find_map(|p| p.trim().strip_prefix("t=")?.parse().ok())?;
        (head.status == 429).then(|| Duration::from_secs(left))
    };
    Some(retry.or_else(limit))
}

/// Waits before the next attempt: as long as the server asked for, or twice as long each time.
///
/// Errors: after the last attempt, and if the server asks for too much.
pub(super) fn pause(
    id: &Id,
    attempt: u32,
    what: &str,
    (why, asked): (String, Option<Duration>),
    observer: Observer,
) -> Result<()> {
    let again = format!("nextflow models pull {id}, later, resumes the download");
    if attempt >= ATTEMPTS {
        let message = format!("{what} could not be downloaded: {why}, {ATTEMPTS} times in a row");
        return Err(Error::new(Kind::Failure, message).hint(again));
    }
    if let Some(long) = asked.filter(|wait| *wait > MAX_WAIT) {
        let message = format!("{what}: {why} and asks to retry in {} s", long.as_secs());
        return Err(Error::new(Kind::Failure, message).hint(again));
    }
    let wait = asked.unwrap_or(Duration::from_millis(250) * (1 << attempt));
    let end = Instant::now() + wait;
    let seconds = wait.as_secs_f64();
    let text = format!("{what}: {why}; waiting {seconds:.1} s, then attempt {} of {ATTEMPTS}", attempt + 1);
    observer(Event::Status(&text))?;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::sleep(left.min(TICK));
        observer(Event::Tick)?;
    }
    Ok(())
}
