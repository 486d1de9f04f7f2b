//! Where a list of blocks goes on: text that means nothing to clients, and nothing for another list.

/// What is listed; a token of one list is refused by every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct List {
    /// Id of the snapshot.
    pub id: u128,
    /// Id of the snapshot it is compared with.
    pub since: Option<u128>,
}

/// Of the whole text; the first byte is the version.
const BYTES: usize = 1 + 16 + 16 + 4;
const BLOCKS: u8 = 1;
const CHANGES: u8 = 2;

/// The token of the part of `list` that begins with block `next`.
pub(super) fn write(list: List, next: u32) -> String {
    let mut text = String::with_capacity(2 * BYTES);
    for byte in head(list).into_iter().chain(next.to_be_bytes()) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The block where `list` goes on.
///
/// # Errors
/// A sentence that says why the token is of no use here.
pub(super) fn read(text: &str, list: List) -> Result<u32, &'static str> {
    let bytes = parse(text).ok_or("it is not a token of this API")?;
    let (found, next) = bytes.split_at(BYTES - 4);
    if found != head(list) {
        return Err("it is of another list, or the snapshot has been made anew: begin again without it");
    }
    next.try_into().map(u32::from_be_bytes).map_err(|_| "it is not a token of this API")
}

fn head(list: List) -> Vec<u8> {
    let kind = if list.since.is_some() { CHANGES } else { BLOCKS };
    [&[kind][..], &list.id.to_be_bytes(), &list.since.unwrap_or_default().to_be_bytes()].concat()
}

fn parse(text: &str) -> Option<Vec<u8>> {
    if text.len() != 2 * BYTES || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::{List, read, write};

    #[test]
    fn a_token_leads_back_into_its_own_list_only() {
        let lists =
            [(1, None), (2, None), (1, Some(2)), (2, Some(1)), (1, Some(0))].map(|(id, since)| List { id, since });
        for list in lists {
            let token = write(list, 0x77);
            for other in lists {
                assert_eq!(read(&token, other).ok(), (list == other).then_some(0x77), "{list:?} {other:?}");
            }
            for bad in ["", "77", &token[1..], &token.replace('7', "g"), &format!("{token}00")] {
                assert!(read(bad, list).is_err(), "{bad}");
            }
        }
    }
}
