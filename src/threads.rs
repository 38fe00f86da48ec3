//! The program's threads: as many as the machine has cores, or as many as the system grants.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use rayon::{ThreadBuilder, ThreadPoolBuilder};

/// Workers that wait for their part of a pool.
type Workers = Vec<Sender<ThreadBuilder>>;

/// Starts up to `wanted` workers with `spawn`; fewer if the system refuses one.
///
/// rayon gives up its whole pool when a single thread is refused, and panics later. So the threads
/// are started first, and the pool gets as many as there are.
fn workers(wanted: usize, mut spawn: impl FnMut(Box<dyn FnOnce() + Send>) -> io::Result<()>) -> Workers {
    let mut workers = Vec::new();
    for _ in 0..wanted {
        let (sender, receiver) = channel::<ThreadBuilder>();
        let work = move || {
            if let Ok(thread) = receiver.recv() {
                thread.run();
            }
        };
        match spawn(Box::new(work)) {
            Ok(()) => workers.push(sender),
            Err(_) => break,
        }
    }
    workers
}

/// Hands each thread of a pool, but for the calling one, to one of `workers`.
fn hand_out(mut workers: Workers) -> impl FnMut(ThreadBuilder) -> io::Result<()> {
    move |thread| {
        let worker = workers.pop().ok_or_else(|| io::Error::other("no thread"))?;
        worker.send(thread).map_err(|_| io::Error::other("a thread that ended"))
    }
}

/// Makes the calling thread and as many others as there are cores, or as `RAYON_NUM_THREADS` says,
/// the pool that all computations share. Where the system grants fewer threads (limits of
/// containers and shared hosts), the pool is smaller.
pub fn start() {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse().ok()).filter(|&n: &usize| n > 0);
    let wanted = asked.or_else(|| thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    let spawn = |work| thread::Builder::new().name("worker".into()).spawn(work).map(drop);
    let workers = workers(wanted - 1, spawn);
    if workers.len() + 1 < wanted {
        // candle's own pool would panic where it gets no threads.
        // SAFETY: the threads so far wait for their work and read no variables.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("CANDLE_NUM_THREADS", "1");
        }
    }
    // It fails only where there is a pool already, which then serves.
    let size = workers.len() + 1;
    let pool = ThreadPoolBuilder::new().num_threads(size).use_current_thread();
    let _ = pool.spawn_handler(hand_out(workers)).build_global();
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn a_pool_has_the_threads_that_the_system_grants() {
        for granted in [0, 1, 3] {
            // A thread belongs to one pool for good.
            let sum = thread::spawn(move || {
                let mut left = granted;
                let workers = workers(3, |work| {
                    if left == 0 {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    left -= 1;
                    thread::Builder::new().spawn(work).map(drop)
                });
                assert_eq!(workers.len(), granted);
                let pool = ThreadPoolBuilder::new().num_threads(granted + 1).use_current_thread();
                let pool = pool.spawn_handler(hand_out(workers)).build().unwrap();
                assert_eq!(pool.current_num_threads(), granted + 1);
                pool.install(|| (0..1000u64).into_par_iter().sum::<u64>())
            });
            assert_eq!(sum.join().unwrap(), 499_500);
        }
    }
}
