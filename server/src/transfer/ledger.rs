//! Who caused which traffic, and what sharing saved: one account for each image and batch on each shard.
//!
//! Guests' bytes are counted where the volume is, chunks where they are fetched and cached; the control thread adds the
//! shards up. Counts are of this process's life. Bytes are of the device, except those that name the object store: these
//! are stored (compressed) bytes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::rc::Rc;
use std::sync::Arc;

use crate::metrics::Metric;

/// Accounts of one shard; later batches share one, so that memory stays bounded.
const ACCOUNTS_MAX: usize = 4096;
/// No snapshot may be named so.
const OTHERS: &str = "(others)";

/// On whose behalf a chunk is fetched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// Name of the snapshot; empty: a blank volume.
    pub snapshot: Arc<str>,
    pub batch: Option<u64>,
}

impl Origin {
    /// An image as such, for no batch.
    #[must_use]
    pub fn image(name: &str) -> Origin {
        Origin { snapshot: Arc::from(name), batch: None }
    }
}

macro_rules! account {
    ($($name:ident: $help:literal),* $(,)?) => {
        /// Counts of one origin on one shard. Plain cells: one thread owns them.
        #[derive(Debug)]
        pub struct Account {
            pub origin: Arc<Origin>,
            /// Volumes of the origin on this shard.
            pub volumes: Cell<u32>,
            $(pub $name: Tally,)*
        }

        /// What accounts add up to.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct Totals {
            $(#[doc = $help] pub $name: u64,)*
        }

        impl Account {
            fn new(origin: Origin) -> Account {
                Account { origin: Arc::new(origin), volumes: Cell::new(0), $($name: Tally::default(),)* }
            }

            /// Whether several volumes of one batch are here: what one asks for, the others will.
            #[must_use]
            pub fn is_wave(&self) -> bool {
                self.origin.batch.is_some() && self.volumes.get() > 1
            }

            #[must_use]
            pub fn totals(&self) -> Totals {
                Totals { $($name: self.$name.0.get(),)* }
            }
        }

        impl AddAssign for Totals {
            fn add_assign(&mut self, other: Totals) {
                $(self.$name += other.$name;)*
            }
        }

        impl Totals {
            /// Each count as a metric of the node.
            #[must_use]
            pub fn metrics(&self) -> Vec<Metric> {
                vec![$((concat!("ledger_", stringify!($name), "_total"), "counter", $help, self.$name),)*]
            }
        }
    };
}

account! {
    asked_bytes: "Bytes that guests read.",
    ram_bytes: "Bytes of chunks found in the RAM cache.",
    disk_bytes: "Bytes of chunks found in the disk cache.",
    joined_bytes: "Bytes of chunks that were on their way for somebody else.",
    fetched_bytes: "Bytes of chunks that came from the object store.",
    gets: "GETs sent to the object store, repetitions and second attempts included.",
    object_bytes: "Stored bytes received from the object store.",
    saved_bytes: "Stored bytes that sharing and the cache kept from leaving the object store again.",
    hedges: "Second attempts of slow priority GETs.",
    retries: "GETs repeated after a failure.",
    throttles: "GETs that the object store asked to slow down, or did not answer in time.",
}

#[derive(Debug, Default)]
pub struct Tally(Cell<u64>);

impl Tally {
    pub fn add(&self, n: u64) {
        self.0.set(self.0.get().wrapping_add(n));
    }
}

/// The accounts of one shard.
#[derive(Default)]
pub struct Ledger(RefCell<BTreeMap<Origin, Rc<Account>>>);

impl Ledger {
    /// The origin's account, opened if need be.
    pub fn account(&self, origin: &Origin) -> Rc<Account> {
        let mut accounts = self.0.borrow_mut();
        if let Some(account) = accounts.get(origin) {
            return account.clone();
        }
        let origin = match accounts.len() < ACCOUNTS_MAX {
            true => origin.clone(),
            false => Origin { snapshot: Arc::from(OTHERS), batch: None },
        };
        accounts.entry(origin).or_insert_with_key(|origin| Rc::new(Account::new(origin.clone()))).clone()
    }

    #[must_use]
    pub fn totals(&self) -> Vec<(Origin, Totals)> {
        self.0.borrow().iter().map(|(origin, account)| (origin.clone(), account.totals())).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{ACCOUNTS_MAX, Ledger, OTHERS, Origin, Totals};

    fn origin(batch: u64) -> Origin {
        Origin { snapshot: Arc::from("debian"), batch: Some(batch) }
    }

    #[test]
    fn an_origin_has_one_account_and_the_number_is_bounded() {
        let ledger = Ledger::default();
        for round in 0..2 {
            for batch in 0..ACCOUNTS_MAX as u64 + 5 {
                ledger.account(&origin(batch)).gets.add(1 + round);
            }
        }
        let totals = ledger.totals();
        assert_eq!(totals.len(), ACCOUNTS_MAX + 1);
        let of = |wanted: &Origin| totals.iter().find(|(origin, _)| origin == wanted).expect("an account").1;
        assert_eq!(of(&origin(7)), Totals { gets: 3, ..Totals::default() });
        assert_eq!(of(&Origin { snapshot: Arc::from(OTHERS), batch: None }).gets, 15, "five origins share one");
        let mut sum = Totals::default();
        totals.iter().for_each(|(_, account)| sum += *account);
        assert_eq!(sum.gets, 3 * (ACCOUNTS_MAX as u64 + 5));
        let metric = sum.metrics().into_iter().find(|(name, ..)| *name == "ledger_gets_total").expect("a metric");
        assert_eq!((metric.1, metric.3), ("counter", sum.gets));
    }
}
