//! The decision in words.

use std::fmt;

use super::{Batch, Load, Plan, Refusal, Skip, Spread, Verdict};
use crate::units::format_size;

/// More stores than this are counted instead of named.
const STORES_NAMED_MAX: usize = 4;

impl Plan {
    /// Why nothing is created, in one sentence; `None` if everything is.
    #[must_use]
    pub fn refusal(&self, batch: &Batch) -> Option<String> {
        let named = |skip: &dyn Fn(&Skip) -> bool| self.skipped(skip);
        match self.outcome.as_ref().err()? {
            Refusal::NoStore => {
                let why = named(&|skip| matches!(skip, Skip::Failing(_)));
                Some(format!(
                    "no volume store takes volumes now: {}",
                    why.unwrap_or_else(|| "there is none".to_string())
                ))
            }
            Refusal::NoSpace { fit } => {
                let missing = size((batch.count - fit) as u128 * u128::from(batch.volume_bytes));
                let failing = named(&|skip| matches!(skip, Skip::Failing(_)));
                let failing = failing.map(|why| format!("; not counted: {why}")).unwrap_or_default();
                Some(format!(
                    "{} of {} do not fit: there is room for {fit} ({}), {missing} are missing at {}{failing}. Free space, add a \
                     volume store, or promise more than there is with a higher overcommit",
                    volumes(batch.count),
                    format_size(batch.volume_bytes),
                    self.rooms(),
                    self.ratio(batch),
                ))
            }
        }
    }

    /// Why volumes of the batch are in a store of this index.
    #[must_use]
    pub fn reason(&self, store: usize, batch: &Batch) -> String {
        let verdict = &self.verdicts[store];
        let open = |verdict: &&Verdict| verdict.skipped.is_none();
        let in_domain = |other: &&Verdict| batch.spread == Spread::Store || other.domain == verdict.domain;
        let choice = self.verdicts.iter().filter(open).filter(in_domain).count();
        let choice = match (choice, &batch.store) {
            (_, Some(_)) => "asked for".to_string(),
            (1, None) => "the only store that takes volumes".to_string(),
            (many, None) => format!("least loaded of {many} stores"),
        };
        let domain = match batch.spread {
            Spread::Store => String::new(),
            Spread::Domain => {
                let of_domain = self.verdicts.iter().filter(|other| other.domain == verdict.domain);
                let given: u64 = of_domain.map(|other| other.volumes).sum();
                format!("domain {} got {given} of {}: ", verdict.domain, volumes(batch.count))
            }
        };
        let given = match batch.count {
            1 => String::new(),
            count => format!(", got {} of {}", verdict.volumes, volumes(count)),
        };
        let skipped = self.skipped(&|skip| *skip != Skip::OtherStoreAsked);
        let skipped = skipped.map(|why| format!("; not used: {why}")).unwrap_or_default();
        let exceeded = if verdict.bandwidth_exceeded { "; its hydration share is promised entirely" } else { "" };
        format!("{domain}{choice}{given}; load {}{exceeded}{skipped}", verdict.after)
    }

    /// The stores that were left out for what `which` accepts, and why.
    fn skipped(&self, which: &dyn Fn(&Skip) -> bool) -> Option<String> {
        let skipped = |verdict: &Verdict| {
            let skip = verdict.skipped.as_ref().filter(|skip| which(skip))?;
            Some(format!("{} ({skip})", verdict.label))
        };
        let texts: Vec<String> = self.verdicts.iter().filter_map(skipped).collect();
        (!texts.is_empty()).then(|| some_of(&texts))
    }

    fn rooms(&self) -> String {
        let open = self.verdicts.iter().filter(|verdict| !matches!(verdict.skipped, Some(Skip::OtherStoreAsked)));
        let texts: Vec<String> = open.map(|verdict| format!("{} {}", verdict.label, verdict.room_before)).collect();
        some_of(&texts)
    }

    /// The ratio that stood in the way.
    fn ratio(&self, batch: &Batch) -> String {
        let mut ratios: Vec<String> = self.verdicts.iter().map(|verdict| verdict.overcommit.to_string()).collect();
        ratios.dedup();
        match (batch.overcommit, ratios.as_slice()) {
            (Some(ratio), _) => format!("overcommit {ratio}"),
            (None, [ratio]) => format!("overcommit {ratio}"),
            _ => "the overcommit of the stores".to_string(),
        }
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Skip::OtherStoreAsked => f.write_str("another store was asked for"),
            Skip::Failing(why) => write!(f, "failing: {why}"),
            Skip::Full { short_bytes } => write!(f, "full: {} short of one volume", size(*short_bytes)),
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Load { total, space, volumes, hydration, guests } = self;
        write!(
            f,
            "{total:.2} of the average (space {space:.2}, volumes {volumes:.2}, hydration {hydration:.2}, guest writes {guests:.2})"
        )
    }
}

fn some_of(texts: &[String]) -> String {
    match texts.len().saturating_sub(STORES_NAMED_MAX) {
        0 => texts.join(", "),
        more => format!("{}, {more} more", texts[..STORES_NAMED_MAX].join(", ")),
    }
}

fn volumes(count: u64) -> String {
    if count == 1 { "1 volume".to_string() } else { format!("{count} volumes") }
}

fn size(bytes: u128) -> String {
    format_size(u64::try_from(bytes).unwrap_or(u64::MAX))
}
