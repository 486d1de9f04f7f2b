//! What is kept for waves, and when it is released.

use std::time::Duration;

use proptest::prelude::*;

use super::Waves;
use crate::platform::Time;

const SPAN: Duration = Duration::from_secs(60);

fn at(seconds: u64) -> Time {
    Time::default().after(Duration::from_secs(seconds))
}

fn pin(waves: &mut Waves, key: u8, seconds: u64) {
    assert!(waves.asked([key; 32], 100, true, at(seconds)) && waves.wants(&[key; 32]));
    waves.pinned(&[key; 32]);
    assert!(!waves.wants(&[key; 32]));
}

#[test]
fn a_chunk_is_kept_until_nobody_has_asked_for_it_for_the_span() {
    let mut waves = Waves::new(SPAN);
    pin(&mut waves, 1, 0);
    pin(&mut waves, 2, 0);
    assert!(!waves.asked([2; 32], 100, true, at(50)), "it is pinned already");
    assert_eq!(waves.due(at(59)), [[0; 32]; 0]);
    assert_eq!((waves.due(at(60)), waves.pinned_bytes()), (vec![[1; 32]], 100));
    assert_eq!((waves.due(at(109)), waves.due(at(110))), (vec![], vec![[2; 32]]));
    assert_eq!((waves.pinned_bytes(), waves.check()), (0, Ok(())));
}

#[test]
fn what_never_came_is_forgotten_and_needs_no_unpinning() {
    let mut waves = Waves::new(SPAN);
    assert!(waves.asked([1; 32], 100, true, at(0)));
    assert_eq!(waves.due(at(60)), [[0; 32]; 0]);
    assert!(!waves.wants(&[1; 32]));
    assert!(waves.asked([2; 32], 100, true, at(60)) && !waves.forget(&[2; 32]) && !waves.wants(&[2; 32]));
}

#[test]
fn an_operators_pins_take_the_place_of_what_was_not_asked_for_for_longest() {
    let mut waves = Waves::new(SPAN);
    pin(&mut waves, 1, 0);
    pin(&mut waves, 2, 1);
    assert!(!waves.asked([1; 32], 100, true, at(2)) && waves.asked([3; 32], 100, true, at(0)));
    assert_eq!((waves.give_up(), waves.give_up(), waves.give_up()), (Some([2; 32]), Some([1; 32]), None));
    assert_eq!(waves.pinned_bytes(), 0);
}

#[test]
fn without_a_span_or_room_nothing_is_kept() {
    assert!(!Waves::new(SPAN).asked([1; 32], 100, false, at(0)));
    assert!(!Waves::new(Duration::ZERO).asked([1; 32], 100, true, at(0)));
}

proptest! {
    /// Each pin is taken back exactly once, whatever happens, and the sums hold.
    #[test]
    fn pins_and_unpins_are_as_many(ops in prop::collection::vec((0_u8..6, 0_u8..8), 1..300)) {
        let mut waves = Waves::new(SPAN);
        let (mut seconds, mut pins) = (0, 0_i64);
        for (op, key) in ops {
            seconds += 3;
            let digest = [key; 32];
            match op {
                0 | 1 => if waves.asked(digest, 10 + usize::from(key), true, at(seconds)) && op == 1 {
                    waves.pinned(&digest);
                    pins += 1;
                },
                2 => if waves.wants(&digest) {
                    waves.pinned(&digest);
                    pins += 1;
                },
                3 => pins -= i64::from(waves.forget(&digest)),
                4 => pins -= waves.due(at(seconds)).len() as i64,
                _ => pins -= i64::from(waves.give_up().is_some()),
            }
            prop_assert_eq!(waves.check(), Ok(()));
            prop_assert_eq!(waves.pinned_bytes() > 0, pins > 0);
        }
        pins -= waves.due(at(seconds + 60)).len() as i64;
        prop_assert_eq!((pins, waves.pinned_bytes()), (0, 0));
    }
}
