//! A number for all scales of an image, or one for each.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};

/// One number, or as many as there are scales: `3`, or `4,4,3,3,1,1`. Never empty.
#[derive(Clone, Debug, PartialEq)]
pub struct PerScale(Vec<f64>);

impl PerScale {
    /// What settings have: a number, and in its place one for each scale if there are any.
    pub fn of(one: f64, each: &[f64]) -> Self {
        Self(if each.is_empty() { vec![one] } else { each.to_vec() })
    }

    /// The number, or the first of several.
    pub fn first(&self) -> f64 {
        self.0.first().copied().unwrap_or_default()
    }

    /// The numbers of the scales, if there are several.
    pub fn each(&self) -> &[f64] {
        if self.0.len() > 1 { &self.0 } else { &[] }
    }

    /// Whether all numbers are one of these.
    pub fn is_all(&self, of: &[f64]) -> bool {
        self.0.iter().all(|x| of.contains(x))
    }
}

impl FromStr for PerScale {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.trim().parse().map_err(|_| format!("{part:?} is not a number"));
        text.split(',').map(number).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for PerScale {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0.iter().map(f64::to_string).collect::<Vec<_>>().join(","))
    }
}

impl<'de> Deserialize<'de> for PerScale {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers;

        impl<'de> de::Visitor<'de> for Numbers {
            type Value = PerScale;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number, or one for every scale")
            }

            fn visit_f64<E: de::Error>(self, x: f64) -> Result<PerScale, E> {
                Ok(PerScale(vec![x]))
            }

            fn visit_u64<E: de::Error>(self, x: u64) -> Result<PerScale, E> {
                Ok(PerScale(vec![x as f64]))
            }

            fn visit_i64<E: de::Error>(self, x: i64) -> Result<PerScale, E> {
                Ok(PerScale(vec![x as f64]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<PerScale, A::Error> {
                let mut numbers = Vec::new();
                while let Some(x) = items.next_element()? {
                    numbers.push(x);
                }
                if numbers.is_empty() { Err(de::Error::invalid_length(0, &self)) } else { Ok(PerScale(numbers)) }
            }
        }
        deserializer.deserialize_any(Numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_or_several() {
        let one: PerScale = "3".parse().unwrap();
        assert_eq!((one.first(), one.each()), (3.0, &[][..]));
        let each: PerScale = "4, 4,1".parse().unwrap();
        assert_eq!((each.first(), each.each(), each.to_string().as_str()), (4.0, &[4.0, 4.0, 1.0][..], "4,4,1"));
        assert!(
            "".parse::<PerScale>().is_err() && "3,".parse::<PerScale>().is_err() && "x".parse::<PerScale>().is_err()
        );
        assert_eq!(serde_json::from_str::<PerScale>("[4, 4.0, 1]").unwrap(), each);
        assert_eq!(serde_json::from_str::<PerScale>("3").unwrap(), one);
        assert!(serde_json::from_str::<PerScale>("[]").is_err() && serde_json::from_str::<PerScale>("\"3\"").is_err());
        assert!(each.is_all(&[1.0, 4.0]) && !each.is_all(&[1.0]));
    }
}
