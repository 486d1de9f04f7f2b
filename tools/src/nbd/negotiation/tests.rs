//! Options parsed from good, bad and random bytes; answers byte by byte.

use proptest::prelude::*;

use super::*;

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

fn info_request(name: &[u8], items: &[u16]) -> Vec<u8> {
    let items: Vec<u8> = items.iter().flat_map(|item| item.to_be_bytes()).collect();
    [string(name), ((items.len() / 2) as u16).to_be_bytes().to_vec(), items].concat()
}

fn context_query(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes().to_vec();
    [vec![string(name), count], queries.iter().map(|query| string(query)).collect()].concat().concat()
}

fn refused(number: u32, data: &[u8]) -> u32 {
    parse_option(number, data).unwrap_err().reply
}

#[test]
fn well_formed_options_are_understood() {
    let go = InfoRequest { export: "web-7".into(), items: vec![info::NAME, info::BLOCK_SIZE] };
    assert_eq!(parse_option(option::GO, &info_request(b"web-7", &[1, 3])), Ok(ClientOption::Go(go)));
    let query = ContextQuery { export: "v".into(), queries: vec!["base:allocation".into(), String::new()] };
    let data = context_query(b"v", &[b"base:allocation", b""]);
    assert_eq!(parse_option(option::SET_META_CONTEXT, &data), Ok(ClientOption::SetMetaContext(query)));
    assert_eq!(parse_option(option::EXPORT_NAME, b"x"), Ok(ClientOption::ExportName("x".into())));
    assert_eq!(parse_option(option::ABORT, b"ignored"), Ok(ClientOption::Abort));
    assert_eq!(parse_option(option::LIST, b""), Ok(ClientOption::List));
    assert_eq!(parse_option(option::STRUCTURED_REPLY, b""), Ok(ClientOption::StructuredReply));
}

#[test]
fn malformed_options_get_a_precise_refusal() {
    use option_reply as r;
    assert_eq!(refused(option::STARTTLS, b""), r::ERR_POLICY);
    for unknown in [0, 4, 11, 99, u32::MAX] {
        assert_eq!(refused(unknown, b"data"), r::ERR_UNSUP);
    }
    assert_eq!(refused(option::LIST, b"x"), r::ERR_INVALID);
    assert_eq!(refused(option::STRUCTURED_REPLY, b"x"), r::ERR_INVALID);
    assert_eq!(refused(option::EXPORT_NAME, &[b'x'; wire::STRING_BYTES_MAX + 1]), r::ERR_INVALID);
    for data in [&b""[..], &[0, 0, 0, 9, b'x'], &[0xff; 4], &info_request(b"\xff", &[]), &info_request(b"a\0b", &[])] {
        assert_eq!(refused(option::GO, data), r::ERR_INVALID, "{data:?}");
    }
    assert_eq!(refused(option::INFO, &[info_request(b"x", &[1]), vec![0]].concat()), r::ERR_INVALID);
    let many = [string(b"x"), (wire::OPTION_ITEMS_MAX + 1).to_be_bytes().to_vec()].concat();
    assert_eq!(refused(option::SET_META_CONTEXT, &many), r::ERR_INVALID);
    assert_eq!(refused(option::SET_META_CONTEXT, &[context_query(b"x", &[]), vec![1]].concat()), r::ERR_INVALID);
}

#[test]
fn contexts_are_listed_by_namespace_and_set_by_name() {
    let q = |queries: &[&str]| queries.iter().map(|q| (*q).to_owned()).collect::<Vec<_>>();
    let pair = |contexts: Contexts| (contexts.allocation, contexts.resident);
    assert_eq!(pair(Contexts::listed(&[])), (true, true));
    assert_eq!(pair(Contexts::listed(&q(&["volley:"]))), (false, true));
    assert_eq!(pair(Contexts::listed(&q(&["base:", "qemu:dirty-bitmap"]))), (true, false));
    assert_eq!(pair(Contexts::chosen(&[])), (false, false));
    assert_eq!(pair(Contexts::chosen(&q(&["base:"]))), (false, false));
    assert_eq!(pair(Contexts::chosen(&q(&["volley:resident", "x-other:y"]))), (false, true));
}

#[test]
fn answers_have_the_bytes_of_the_protocol() {
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
    let mut out = Vec::new();
    push_reply(&mut out, option::LIST, option_reply::ERR_UNSUP, b"no");
    assert_eq!(out, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x80\x00\x00\x01\x00\x00\x00\x02no");
    assert_eq!(export_name_answer(4096, false, true).len(), 10);
    assert_eq!(export_name_answer(4096, false, false).len(), 134);
    assert_eq!(export_name_answer(4096, true, true), b"\x00\x00\x00\x00\x00\x00\x10\x00\x05\xed");
}

#[test]
fn block_sizes_are_always_told_and_texts_on_request() {
    let about = Description { size_bytes: 4096, text: "a disk".into() };
    let answer = |items: &[u16]| {
        let mut out = Vec::new();
        push_info(&mut out, option::GO, &InfoRequest { export: "v".into(), items: items.to_vec() }, &about, true);
        out
    };
    let plain = answer(&[]);
    assert_eq!(plain.len(), (20 + 12) + (20 + 14) + 20);
    assert_eq!(plain[52..66], [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    let full = answer(&[info::NAME, info::DESCRIPTION, 77]);
    assert!(full.windows(8).any(|w| w == b"\x00\x02a disk") && full.windows(3).any(|w| w == b"\x00\x01v"));
}

proptest! {
    #[test]
    fn any_bytes_are_an_option_or_refused(number in 0u32..13, data in prop::collection::vec(any::<u8>(), 0..200)) {
        match parse_option(number, &data) {
            Ok(_) => {}
            Err(refusal) => prop_assert!(refusal.reply >> 31 == 1 && !refusal.message.is_empty()),
        }
    }

    #[test]
    fn info_requests_round_trip_and_no_prefix_is_accepted(
        name in "[a-z0-9-]{0,40}", items in prop::collection::vec(any::<u16>(), 0..20), cut in any::<prop::sample::Index>(),
    ) {
        let data = info_request(name.as_bytes(), &items);
        let want = ClientOption::Info(InfoRequest { export: name, items });
        prop_assert_eq!(parse_option(option::INFO, &data), Ok(want));
        prop_assert!(parse_option(option::INFO, &data[..cut.index(data.len())]).is_err());
    }

    #[test]
    fn context_queries_round_trip_and_no_prefix_is_accepted(
        queries in prop::collection::vec("[a-z:]{0,20}", 0..8), cut in any::<prop::sample::Index>(),
    ) {
        let data = context_query(b"v", &queries.iter().map(|q| q.as_bytes()).collect::<Vec<_>>());
        let want = ClientOption::ListMetaContext(ContextQuery { export: "v".into(), queries });
        prop_assert_eq!(parse_option(option::LIST_META_CONTEXT, &data), Ok(want));
        prop_assert!(parse_option(option::LIST_META_CONTEXT, &data[..cut.index(data.len())]).is_err());
    }

    #[test]
    fn only_the_magic_decides_about_a_header(bytes in any::<[u8; 16]>(), option in any::<u32>(), len in any::<u32>()) {
        prop_assert!(parse_option_header(&bytes).is_err() || bytes[..8] == wire::OPTION_MAGIC.to_be_bytes());
        let mut good = bytes;
        good[..8].copy_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        good[8..12].copy_from_slice(&option.to_be_bytes());
        good[12..].copy_from_slice(&len.to_be_bytes());
        prop_assert_eq!(parse_option_header(&good), Ok(OptionHeader { option, len_bytes: len }));
    }
}
