//! Windows of attention, and the order of tokens in which each of them is one piece.

/// Windows of one size, one after the other.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Batch {
    /// The first patch.
    pub first: usize,
    /// Windows.
    pub count: usize,
    /// Patches of each.
    pub len: usize,
}

/// The windows of a grid.
#[derive(Debug)]
pub(super) struct Windows {
    /// Index (row-major) of every token in the order of the windows.
    pub order: Vec<u32>,
    /// What belongs together in that order.
    pub batches: Vec<Batch>,
}

impl Windows {
    /// Windows of `side` by `side` tokens of `unit` patches over a grid (height, width); what is
    /// left at the right and at the bottom is smaller ones. Windows do not see each other, so those
    /// of one size may stand together.
    pub fn new((h, w): (usize, usize), side: usize, unit: usize) -> Self {
        let mut windows: Vec<Vec<u32>> = Vec::new();
        for top in (0..h).step_by(side) {
            for left in (0..w).step_by(side) {
                let (rows, columns) = (top..h.min(top + side), left..w.min(left + side));
                windows.push(rows.flat_map(|i| columns.clone().map(move |j| (i * w + j) as u32)).collect());
            }
        }
        windows.sort_by_key(|window| std::cmp::Reverse(window.len()));
        let mut batches: Vec<Batch> = Vec::new();
        let mut first = 0;
        for window in &windows {
            let len = window.len() * unit;
            match batches.last_mut().filter(|b| b.len == len) {
                Some(batch) => batch.count += 1,
                None => batches.push(Batch { first, count: 1, len }),
            }
            first += len;
        }
        Self { order: windows.concat(), batches }
    }

    /// The index of every token in that order.
    pub fn places(&self) -> Vec<u32> {
        let mut places = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(place, &token)| places[token as usize] = place as u32);
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_of_one_size_stand_together() {
        let windows = Windows::new((3, 5), 2, 4);
        assert_eq!(windows.order, [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]);
        let batch = |first, count, len| Batch { first, count, len };
        assert_eq!(windows.batches, [batch(0, 2, 16), batch(32, 3, 8), batch(56, 1, 4)]);
        let places = windows.places();
        assert!(windows.order.iter().enumerate().all(|(i, &t)| places[t as usize] == i as u32));
    }
}
