//! Checks that the image data of a JPEG are complete. Decoders draw grey for missing data without
//! an error, also in their strict modes, so the Huffman codes of every scan are counted here (ITU
//! T.81, F and G; no pixels are computed).

const CUT: &str = "the file is cut off";
const DAMAGED: &str = "its image data are damaged or incomplete";
/// Bytes after a scan that belong to nothing: some cameras pad.
const PADDING: usize = 64;
/// Decoders refuse more.
const MAX_SCANS: usize = 100;
/// Larger images are refused anyway.
const MAX_SIDE: usize = 1 << 13;

/// What is wrong with the data of a JPEG file, if anything. Bytes after its end are ignored:
/// cameras put further images there. Files that it cannot check (arithmetic coding, missing tables)
/// are left to the decoder.
pub(super) fn fault(bytes: &[u8]) -> Option<&'static str> {
    let mut file = File { bytes, at: 2, ..File::default() };
    file.walk().err()
}

/// A Huffman table by the next 16 bits: the length of the code and its symbol; length 0 is no code.
type Table = Vec<(u8, u8)>;

#[derive(Default)]
struct File<'a> {
    bytes: &'a [u8],
    at: usize,
    /// For DC, then for AC.
    tables: [[Option<Table>; 4]; 2],
    frame: Option<Frame>,
    /// MCUs between restart markers.
    restart: usize,
    scans: usize,
}

#[derive(Default)]
struct Frame {
    progressive: bool,
    /// (columns, rows) of MCUs.
    mcus: (usize, usize),
    components: Vec<Component>,
}

#[derive(Default)]
struct Component {
    id: u8,
    /// Blocks of an MCU.
    per_mcu: usize,
    /// (columns, rows) of blocks.
    blocks: (usize, usize),
    /// Of every block the coefficients that are not zero, as bits.
    nonzero: Vec<u64>,
    seen: bool,
}

/// The coefficients of every block in a scan.
struct Band {
    start: usize,
    end: usize,
    refines: bool,
}

impl File<'_> {
    fn walk(&mut self) -> Result<(), &'static str> {
        loop {
            let marker = self.marker().ok_or(CUT)?;
            match marker {
                // The end.
                0xd9 => {
                    let complete = self.frame.as_ref().is_some_and(|f| f.components.iter().all(|c| c.seen));
                    return if complete { Ok(()) } else { Err(DAMAGED) };
                }
                0x01 | 0xd0..=0xd8 => continue,
                _ => {}
            }
            let length = self.bytes.get(self.at..self.at + 2).map(|b| usize::from(b[0]) << 8 | usize::from(b[1]));
            let length = length.ok_or(CUT)?;
            let segment = self.bytes.get(self.at + 2..self.at + length.max(2)).ok_or(CUT)?;
            self.at += length.max(2);
            match marker {
                0xc4 => self.huffman(segment).ok_or(DAMAGED)?,
                0xdd => self.restart = number(segment, 0).ok_or(DAMAGED)?,
                0xc0..=0xc2 => match frame(segment, marker == 0xc2) {
                    Some(frame) => self.frame = Some(frame),
                    None => return Ok(()),
                },
                // Lossless, hierarchical or arithmetic.
                0xc3 | 0xc5..=0xcf => return Ok(()),
                0xda if self.scans == MAX_SCANS => return Ok(()),
                0xda => {
                    self.scans += 1;
                    if !self.scan(segment)? {
                        return Ok(());
                    }
                }
                _ => {}
            }
        }
    }

    /// The next marker, and `at` behind it.
    fn marker(&mut self) -> Option<u8> {
        loop {
            let rest = self.bytes.get(self.at..)?;
            self.at += rest.iter().position(|b| *b == 0xff)? + 1;
            let next = *self.bytes.get(self.at)?;
            if next != 0 && next != 0xff {
                self.at += 1;
                return Some(next);
            }
        }
    }

    fn huffman(&mut self, mut segment: &[u8]) -> Option<()> {
        while let [kind, rest @ ..] = segment {
            let (counts, rest) = rest.split_at_checked(16)?;
            let total = counts.iter().map(|n| usize::from(*n)).sum();
            let (mut symbols, rest) = rest.split_at_checked(total)?;
            segment = rest;
            let mut table: Table = vec![(0, 0); 1 << 16];
            let mut from = 0usize;
            for (length, count) in (1u8..).zip(counts) {
                let (now, later) = symbols.split_at(usize::from(*count));
                symbols = later;
                for symbol in now {
                    let to = from + (1 << (16 - length));
                    table.get_mut(from..to)?.fill((length, *symbol));
                    from = to;
                }
            }
            *self.tables.get_mut(usize::from(kind >> 4))?.get_mut(usize::from(kind & 15))? = Some(table);
        }
        Some(())
    }

    /// Reads a scan; whether it could be judged.
    fn scan(&mut self, header: &[u8]) -> Result<bool, &'static str> {
        let Some(frame) = &mut self.frame else { return Err(DAMAGED) };
        let count = usize::from(*header.first().ok_or(DAMAGED)?);
        let [named @ .., start, end, levels] = &header[1..] else { return Err(DAMAGED) };
        if named.len() != 2 * count || count == 0 || *end > 63 || start > end {
            return Err(DAMAGED);
        }
        let band = Band { start: (*start).into(), end: (*end).into(), refines: levels >> 4 > 0 };
        // Of every component: its place in the frame, and its tables.
        let mut parts = Vec::new();
        for pair in named.as_chunks::<2>().0 {
            let index = frame.components.iter().position(|c| c.id == pair[0]).ok_or(DAMAGED)?;
            let table = |kind: usize, n: u8| self.tables[kind].get(usize::from(n)).and_then(Option::as_ref);
            parts.push((index, table(0, pair[1] >> 4), table(1, pair[1] & 15)));
        }
        let needs = |dc: bool| if frame.progressive { dc == (band.start == 0) && !(dc && band.refines) } else { true };
        if parts.iter().any(|(_, dc, ac)| needs(true) && dc.is_none() || needs(false) && ac.is_none()) {
            return Ok(false);
        }
        let (columns, rows) = match parts[..] {
            [(index, ..)] => frame.components[index].blocks,
            _ => frame.mcus,
        };
        let mut bits = Bits { bytes: self.bytes, at: self.at, held: 0, count: 0 };
        let (mut run, mut restarts) = (0, 0);
        for mcu in 0..columns * rows {
            if self.restart > 0 && mcu > 0 && mcu % self.restart == 0 {
                bits.restart(restarts)?;
                (run, restarts) = (0, (restarts + 1) % 8);
            }
            for (index, dc, ac) in &parts {
                let component = &mut frame.components[*index];
                let blocks = if parts.len() == 1 { 1 } else { component.per_mcu };
                for _ in 0..blocks {
                    let read = match (frame.progressive, band.start) {
                        (false, _) => bits.block(dc, ac),
                        (true, 0) if band.refines => bits.take(1).map(drop),
                        (true, 0) => bits.level(dc),
                        _ if band.refines => bits.refine(ac, &band, &mut run, &mut component.nonzero[mcu]),
                        _ => bits.first(ac, &band, &mut run, &mut component.nonzero[mcu]),
                    };
                    read.ok_or_else(|| bits.why())?;
                }
            }
        }
        if run > 0 {
            return Err(DAMAGED);
        }
        self.at = bits.end()?;
        parts.iter().for_each(|(index, ..)| frame.components[*index].seen |= band.start == 0);
        Ok(true)
    }
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    bytes.get(at..at + 2).map(|b| usize::from(b[0]) << 8 | usize::from(b[1]))
}

/// A frame of 8 bits per sample and known size.
fn frame(segment: &[u8], progressive: bool) -> Option<Frame> {
    let (height, width) = (number(segment, 1)?, number(segment, 3)?);
    if segment[0] != 8 || !(1..=MAX_SIDE).contains(&height) || !(1..=MAX_SIDE).contains(&width) {
        return None;
    }
    let named = segment.get(6..6 + 3 * usize::from(segment[5]))?.as_chunks::<3>().0;
    let factors = |c: &[u8; 3]| (usize::from(c[1] >> 4), usize::from(c[1] & 15));
    let most = |pick: fn((usize, usize)) -> usize| named.iter().map(|c| pick(factors(c))).max();
    let (across, down) = (most(|(h, _)| h)?, most(|(_, v)| v)?);
    if named.len() > 4 || named.iter().map(factors).any(|(h, v)| !(1..=4).contains(&h) || !(1..=4).contains(&v)) {
        return None;
    }
    let component = |c: &[u8; 3]| {
        let (h, v) = factors(c);
        let blocks = ((width * h).div_ceil(across).div_ceil(8), (height * v).div_ceil(down).div_ceil(8));
        let nonzero = vec![0; if progressive { blocks.0 * blocks.1 } else { 0 }];
        Component { id: c[0], per_mcu: h * v, blocks, nonzero, seen: false }
    };
    let mcus = (width.div_ceil(8 * across), height.div_ceil(8 * down));
    Some(Frame { progressive, mcus, components: named.iter().map(component).collect() })
}

/// The bits of a scan, up to the next marker.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The last `count` of these bits are still to be read.
    held: u64,
    count: u32,
}

impl Bits<'_> {
    /// The next byte of data, if there is one before a marker.
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += match (byte, self.bytes.get(self.at + 1)) {
            (0xff, Some(0)) => 2,
            (0xff, _) => return None,
            _ => 1,
        };
        Some(byte)
    }

    /// Fills the buffer to at least `count` bits, if there are as many.
    fn fill(&mut self, bits: u32) {
        while self.count < bits {
            let Some(byte) = self.byte() else { return };
            (self.held, self.count) = (self.held << 8 | u64::from(byte), self.count + 8);
        }
    }

    fn take(&mut self, bits: u32) -> Option<usize> {
        self.fill(bits);
        self.count = self.count.checked_sub(bits)?;
        Some((self.held >> self.count) as usize & ((1 << bits) - 1))
    }

    fn symbol(&mut self, table: &Option<&Table>) -> Option<usize> {
        self.fill(16);
        let next = if self.count >= 16 { self.held >> (self.count - 16) } else { self.held << (16 - self.count) };
        let (length, symbol) = table.as_ref()?[next as usize & 0xffff];
        self.count = self.count.checked_sub(length.into()).filter(|_| length > 0)?;
        Some(symbol.into())
    }

    /// A DC coefficient.
    fn level(&mut self, dc: &Option<&Table>) -> Option<()> {
        let size = self.symbol(dc).filter(|size| *size <= 16)?;
        self.take(size as u32).map(drop)
    }

    /// All coefficients of a block.
    fn block(&mut self, dc: &Option<&Table>, ac: &Option<&Table>) -> Option<()> {
        self.level(dc)?;
        self.first(ac, &Band { start: 1, end: 63, refines: false }, &mut 0, &mut 0)
    }

    /// AC coefficients of a block; in `run` the blocks to come that have none.
    fn first(&mut self, ac: &Option<&Table>, band: &Band, run: &mut usize, nonzero: &mut u64) -> Option<()> {
        if *run > 0 {
            *run -= 1;
            return Some(());
        }
        let mut at = band.start;
        while at <= band.end {
            let symbol = self.symbol(ac)?;
            match (symbol >> 4, symbol & 15) {
                (15, 0) => at += 16,
                (zeros, 0) => {
                    *run = (1 << zeros) - 1 + self.take(zeros as u32)?;
                    return Some(());
                }
                (zeros, size) => {
                    at += zeros;
                    self.take(size as u32).filter(|_| at <= band.end)?;
                    *nonzero |= 1 << at;
                    at += 1;
                }
            }
        }
        (at <= band.end + 1).then_some(())
    }

    /// One more bit of the AC coefficients of a block.
    fn refine(&mut self, ac: &Option<&Table>, band: &Band, run: &mut usize, nonzero: &mut u64) -> Option<()> {
        let mut at = band.start;
        while *run == 0 && at <= band.end {
            let symbol = self.symbol(ac)?;
            let (mut zeros, new) = (symbol >> 4, symbol & 15 > 0);
            if !new && zeros < 15 {
                *run = (1 << zeros) + self.take(zeros as u32)?;
                break;
            }
            if new {
                self.take(1)?;
            }
            while at <= band.end {
                if *nonzero >> at & 1 == 1 {
                    self.take(1)?;
                } else if zeros == 0 {
                    break;
                } else {
                    zeros -= 1;
                }
                at += 1;
            }
            if new {
                *nonzero |= (at <= band.end).then_some(1 << at)?;
            }
            at += 1;
        }
        if *run > 0 {
            let known = *nonzero >> at & (u64::MAX >> (63 - band.end.saturating_sub(at)));
            let known = if at <= band.end { known.count_ones() } else { 0 };
            (0..known).try_for_each(|_| self.take(1).map(drop))?;
            *run -= 1;
        }
        Some(())
    }

    /// Goes over what pads the data to the next marker, which `at` is then.
    fn skip_padding(&mut self) -> Result<(), &'static str> {
        let mut padding = self.count as usize / 8;
        (self.held, self.count) = (0, 0);
        loop {
            while self.byte().is_some() {
                padding += 1;
            }
            match self.bytes.get(self.at + 1) {
                _ if padding > PADDING => return Err(DAMAGED),
                // Fill bytes.
                Some(0xff) => self.at += 1,
                Some(_) => return Ok(()),
                None => return Err(CUT),
            }
        }
    }

    fn restart(&mut self, number: u8) -> Result<(), &'static str> {
        self.skip_padding()?;
        if self.bytes[self.at + 1] != 0xd0 + number {
            return Err(DAMAGED);
        }
        self.at += 2;
        Ok(())
    }

    /// Where the marker after the scan is.
    fn end(mut self) -> Result<usize, &'static str> {
        self.skip_padding()?;
        Ok(self.at)
    }

    /// Why there were no more codes.
    fn why(&self) -> &'static str {
        if self.at + 1 >= self.bytes.len() { CUT } else { DAMAGED }
    }
}

#[cfg(test)]
mod tests;
