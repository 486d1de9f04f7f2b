//! Which blocks of a volume the requests of a load go to.

use std::str::FromStr;

use super::Random;

/// Skew of a Zipf distribution where none is given: that of YCSB.
const THETA_DEFAULT: f64 = 0.99;

/// How blocks follow each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    Uniform,
    Sequential,
    /// Some are asked for much more than others; `theta`: how much, from 0 (uniform) to less than 1.
    Zipf {
        theta: f64,
    },
}

impl FromStr for Order {
    type Err = String;

    /// `uniform`, `sequential`, `zipf` or `zipf:THETA`.
    fn from_str(text: &str) -> Result<Order, String> {
        match text {
            "uniform" => return Ok(Order::Uniform),
            "sequential" => return Ok(Order::Sequential),
            "zipf" => return Ok(Order::Zipf { theta: THETA_DEFAULT }),
            _ => {}
        }
        let theta = text.strip_prefix("zipf:").and_then(|theta| theta.parse().ok());
        match theta.filter(|theta| (0.0..1.0).contains(theta)) {
            Some(theta) => Ok(Order::Zipf { theta }),
            None => {
                Err(format!("{text:?} is none of uniform, sequential, zipf, zipf:THETA with THETA from 0 to below 1"))
            }
        }
    }
}

/// The blocks of one worker: every `step`th from `first`, `count` of them.
#[derive(Clone, Debug)]
pub struct Blocks {
    first: u64,
    step: u64,
    count: u64,
    next: u64,
    random: Random,
    order: Order,
    zipf: Option<Zipf>,
}

impl Blocks {
    /// `count` is not 0.
    #[must_use]
    pub fn new(first: u64, step: u64, count: u64, order: Order, random: Random) -> Blocks {
        let zipf = match order {
            Order::Zipf { theta } => Some(Zipf::new(count, theta)),
            _ => None,
        };
        Blocks { first, step, count, next: 0, random, order, zipf }
    }

    /// The number of the next block.
    pub fn next_block(&mut self) -> u64 {
        let index = match (self.order, &self.zipf) {
            (Order::Sequential, _) => self.next,
            (_, Some(zipf)) => zipf.index(self.random.fraction()),
            _ => self.random.below(self.count),
        };
        self.next = (self.next + 1) % self.count;
        self.first + index * self.step
    }
}

/// Numbers below `count`, by Gray et al., "Quickly generating billion-record synthetic databases" (1994), as YCSB has it.
#[derive(Clone, Debug)]
struct Zipf {
    count: u64,
    theta: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    fn new(count: u64, theta: f64) -> Zipf {
        let sum = |n: u64| (1..=n).map(|rank| (rank as f64).powf(-theta)).sum::<f64>();
        let zeta = sum(count);
        let eta = (1.0 - (2.0 / count as f64).powf(1.0 - theta)) / (1.0 - sum(2.min(count)) / zeta);
        Zipf { count, theta, zeta, eta }
    }

    /// The most wanted ones are not neighbours: ranks are scattered over the whole.
    fn index(&self, fraction: f64) -> u64 {
        let from_first = fraction * self.zeta;
        let rank = if from_first < 1.0 {
            0
        } else if from_first < 1.0 + 0.5_f64.powf(self.theta) {
            1
        } else {
            let exponent = 1.0 / (1.0 - self.theta);
            (self.count as f64 * (self.eta * fraction - self.eta + 1.0).powf(exponent)) as u64
        };
        (u128::from(rank.min(self.count - 1)) * 0x9e37_79b9_7f4a_7c15 % u128::from(self.count)) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::{Blocks, Order};
    use crate::load::Random;

    fn blocks(first: u64, step: u64, count: u64, order: Order) -> Blocks {
        Blocks::new(first, step, count, order, Random::new(7))
    }

    #[test]
    fn workers_take_disjoint_blocks_and_together_all() {
        let mut seen = HashSet::new();
        for share in 0..3 {
            let count = (10_u64 - share).div_ceil(3);
            let mut mine = blocks(share, 3, count, Order::Sequential);
            assert!((0..count).all(|_| seen.insert(mine.next_block())));
            assert_eq!(mine.next_block(), share, "starts again");
        }
        assert_eq!(seen, (0..10).collect::<HashSet<u64>>());
    }

    #[test]
    fn random_blocks_stay_inside() {
        let mut mine = blocks(1, 4, 5, Order::Uniform);
        let seen: HashSet<u64> = (0..200).map(|_| mine.next_block()).collect();
        assert_eq!(seen, HashSet::from([1, 5, 9, 13, 17]));
    }

    #[test]
    fn of_a_zipf_distribution_the_first_block_has_its_share() {
        let count = 1000;
        let mut mine = blocks(0, 1, count, Order::Zipf { theta: 0.99 });
        let mut times: HashMap<u64, u32> = HashMap::new();
        (0..100_000).for_each(|_| *times.entry(mine.next_block()).or_default() += 1);
        assert!(times.keys().all(|block| *block < count));
        // 1 / zeta(1000, 0.99) is 0.1294.
        let most = f64::from(*times.values().max().expect("some")) / 100_000.0;
        assert!((0.12..0.14).contains(&most), "{most}");
        let single = blocks(0, 1, 1, Order::Zipf { theta: 0.5 }).next_block();
        assert_eq!(single, 0);
    }

    #[test]
    fn orders_are_parsed() {
        assert_eq!("zipf".parse(), Ok(Order::Zipf { theta: 0.99 }));
        assert_eq!("zipf:0.5".parse(), Ok(Order::Zipf { theta: 0.5 }));
        for wrong in ["zipf:1", "zipf:-1", "random", ""] {
            assert!(wrong.parse::<Order>().is_err(), "{wrong}");
        }
    }
}
