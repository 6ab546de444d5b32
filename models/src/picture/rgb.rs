//! RGB images and their sizes.

use std::fmt;

/// An RGB image: pixels row by row, three bytes each.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `3 * width * height` bytes.
    pub data: Vec<u8>,
}

impl Rgb {
    /// The middle of the image on a black canvas of (width, height), which may be smaller.
    pub(crate) fn on_canvas(&self, (width, height): (usize, usize)) -> Self {
        let mut data = vec![0; 3 * width * height];
        // Where a line of the image begins on the canvas, where on itself, and how much is shown.
        let place = |own: usize, canvas: usize| {
            let half = own / 2;
            let (on, from) = ((canvas / 2).saturating_sub(half), half.saturating_sub(canvas / 2));
            (on, from, (own - from).min(canvas - on))
        };
        let (left, first, across) = place(self.width, width);
        let (top, from, down) = place(self.height, height);
        for y in 0..down {
            let source = 3 * ((from + y) * self.width + first);
            let target = 3 * ((top + y) * width + left);
            data[target..target + 3 * across]
                .copy_from_slice(&self.data[source..source + 3 * across]);
        }
        Self { width, height, data }
    }
}

impl fmt::Debug for Rgb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rgb({}x{})", self.width, self.height)
    }
}

/// Width and height of an image in pixels, both multiples of 8 and at least 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Size {
    width: usize,
    height: usize,
}

impl Size {
    /// A size, if both sides are positive multiples of 8.
    pub fn new(width: usize, height: usize) -> Option<Self> {
        let valid = |side: usize| side >= 8 && side.is_multiple_of(8);
        (valid(width) && valid(height)).then_some(Self { width, height })
    }

    /// Width in pixels.
    pub fn width(self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(self) -> usize {
        self.height
    }

    /// Width times height.
    pub fn pixels(self) -> usize {
        self.width * self.height
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_multiples_of_eight() {
        assert!(Size::new(512, 512).is_some());
        assert!(Size::new(0, 512).is_none());
        assert!(Size::new(511, 512).is_none());
    }
}
