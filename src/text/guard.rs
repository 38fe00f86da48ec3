//! Panics of the `tokenizers` library as errors, without their text on stderr.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    /// How many guards this thread is inside of.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Runs library code on untrusted data: `None` if it panicked. The panic hook prints nothing
/// meanwhile, on this thread only; the library starts no others for these calls.
pub(super) fn guard<T>(run: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if DEPTH.get() == 0 {
                usual(info);
            }
        }));
    });
    DEPTH.set(DEPTH.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(run));
    DEPTH.set(DEPTH.get() - 1);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_caught_and_the_depth_restored() {
        assert_eq!(guard(|| guard(|| -> u8 { panic!("printed by nobody") })), Some(None));
        assert_eq!(guard(|| 7), Some(7));
        assert_eq!(DEPTH.get(), 0);
    }
}
