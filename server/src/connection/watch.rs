//! Closes connections whose peers stall: no greeting, half a frame, replies that are not taken.

use std::rc::Rc;
use std::time::Duration;

use super::{Connections, Refusal};
use crate::limits::{CONNECTIONS_BYTES_MAX, HELLO_DEADLINE, STALL_MAX, STALL_PRESSED_MAX};
use crate::platform::{Platform, Time};

/// Between two looks at all connections of a shard.
const TICK: Duration = Duration::from_secs(1);

/// Runs while there are connections.
pub(super) async fn watch<P: Platform>(platform: P, connections: Rc<Connections>) {
    while connections.open() > 0 {
        platform.sleep(TICK).await;
        let pressed = connections.held_bytes() >= CONNECTIONS_BYTES_MAX;
        for session in connections.sessions() {
            if let Some(refusal) = overdue(&session, platform.now(), pressed) {
                tracing::warn!(peer = session.peer(), ?refusal, "closing a connection");
                connections.refuse(refusal);
                session.hang_up();
            }
        }
    }
    connections.watched.set(false);
}

/// What the peer should have done by now. While memory is short nobody may stall at the others' expense.
fn overdue(session: &super::Session, now: Time, pressed: bool) -> Option<Refusal> {
    let patience = if pressed && session.held_bytes() > 0 { STALL_PRESSED_MAX } else { STALL_MAX };
    let waits = |since: Option<Time>, limit: Duration| since.is_some_and(|since| now.since(since) >= limit);
    if waits(session.greeting_since(), HELLO_DEADLINE) {
        Some(Refusal::HelloLate)
    } else if waits(session.sending_since(), patience) {
        Some(Refusal::StalledReader)
    } else if waits(session.receiving_since(), patience) {
        Some(Refusal::StalledSender)
    } else {
        None
    }
}
