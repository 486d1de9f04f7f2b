//! Reads, listings, deletions, and the first look at a bucket.

use futures::executor::block_on;

use super::*;
use crate::object_store::s3::transport::HttpErrorKind;

#[test]
fn keys_get_the_prefix_and_addresses_their_style() {
    for (config, url) in [
        (config(), "http://store:9000/bucket/pre/fix/packs/a"),
        (S3Config { addressing: Addressing::Virtual, ..config() }, "http://bucket.store:9000/pre/fix/packs/a"),
        (S3Config::default(), "https://bucket.s3.us-east-1.amazonaws.com/pre/fix/packs/a"),
        (
            S3Config { region: Some("eu-west-3".to_owned()), addressing: Addressing::Path, ..S3Config::default() },
            "https://s3.eu-west-3.amazonaws.com/bucket/pre/fix/packs/a",
        ),
    ] {
        let fake = Fake::new(|_, _| ok("x"));
        assert_eq!(block_on(store_with(&fake, &config).get("packs/a")).unwrap(), b"x");
        assert_eq!(fake.sent()[0].target, url);
    }
}

#[test]
fn requests_are_signed_unless_anonymous() {
    let fake = Fake::new(|_, _| ok("x"));
    block_on(store(&fake).get("a")).unwrap();
    let url = fake.sent()[0].url.clone();
    assert!(url.contains("X-Amz-Credential=AK%2F") && url.contains("&X-Amz-Signature="), "{url}");
    let anonymous = S3Config { anonymous: true, ..config() };
    block_on(store_with(&fake, &anonymous).get("a")).unwrap();
    assert!(!fake.sent()[1].url.contains("X-Amz"));
}

#[test]
fn a_range_is_asked_for_and_checked() {
    let fake = Fake::new(|number, sent| {
        assert_eq!(sent.header("range"), Some("bytes=10-14"));
        assert!(sent.url.contains("X-Amz-SignedHeaders=host%3Brange"));
        let (range, body) = match number {
            0 => ("bytes 10-14/99", "hello"),
            1 => ("bytes 11-15/99", "hello"),
            2 => ("bytes 10-14/99", "hell"),
            _ => ("bytes 10-12/13", "hel"),
        };
        answer(206, &[("content-range", range)], body)
    });
    let store = store(&fake);
    assert_eq!(&block_on(store.get_range("p", 10..15)).unwrap()[..], b"hello");
    for _ in 0..3 {
        assert!(matches!(block_on(store.get_range("p", 10..15)), Err(ObjectError::Corrupt(_))));
    }
    assert!(block_on(store.get_range("p", 7..7)).unwrap().is_empty());
    assert_eq!(fake.lines().len(), 4);
}

#[test]
fn what_may_pass_is_tried_again_and_what_may_not_is_told_at_once() {
    let fake = Fake::new(|number, _| match number {
        0 => refusal(503, "SlowDown"),
        1 => Err(HttpError::new(HttpErrorKind::Broken, "cut")),
        _ => ok("x"),
    });
    assert_eq!(block_on(store(&fake).get("a")).unwrap(), b"x");
    assert_eq!(fake.lines().len(), 3);

    let fake = Fake::new(|_, _| refusal(503, "SlowDown"));
    assert!(matches!(block_on(store(&fake).get("a")), Err(ObjectError::SlowDown(_))));
    // Transfer retries ranges itself.
    assert!(matches!(block_on(store(&fake).get_range("a", 0..1)), Err(ObjectError::SlowDown(_))));
    assert_eq!(fake.lines().len(), 3 + 1);

    let fake = Fake::new(|_, _| refusal(403, "AccessDenied"));
    let error = block_on(store(&fake).get("a")).unwrap_err().to_string();
    assert!(error.contains("s3://bucket/pre/fix at http://store:9000") && error.contains("s3:GetObject"), "{error}");
    assert_eq!(fake.lines().len(), 1);
}

#[test]
fn a_missing_object_is_named_by_its_own_key() {
    let fake = Fake::new(|_, _| refusal(404, "NoSuchKey"));
    assert_eq!(block_on(store(&fake).get("a/b")), Err(ObjectError::NotFound("a/b".to_owned())));
    assert_eq!(block_on(store(&fake).delete("a/b")), Ok(()));
    for bad in ["", "/a", "a//b", "../a", ".a", "a?b"] {
        assert!(matches!(block_on(store(&fake).get(bad)), Err(ObjectError::Fatal(_))), "{bad}");
    }
    assert_eq!(fake.lines().len(), 2, "bad keys never leave");
}

fn page(keys: &[&str], next: Option<&str>) -> Answer {
    let contents: String =
        keys.iter().map(|key| format!("<Contents><Key>{key}</Key><Size>3</Size></Contents>")).collect();
    let next = next.map(|token| format!("<NextContinuationToken>{token}</NextContinuationToken>")).unwrap_or_default();
    ok(&format!(
        "<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><MaxKeys>1000</MaxKeys>\
         <EncodingType>url</EncodingType>{contents}{next}</ListBucketResult>"
    ))
}

#[test]
fn a_listing_is_read_page_by_page_and_strangers_are_left_out() {
    let fake = Fake::new(|number, _| match number {
        0 => page(&["pre/fix/packs/b", "pre/fix/packs/.hidden", "pre/fix/packs/with%20space"], Some("t/1")),
        _ => page(&["pre/fix/packs/a"], None),
    });
    let found = block_on(store(&fake).list("packs/")).unwrap();
    let meta = |key: &str| ObjectMeta { key: key.to_owned(), size_bytes: 3 };
    assert_eq!(found, [meta("packs/a"), meta("packs/b")]);
    let base = "GET http://store:9000/bucket/?";
    let query = "encoding-type=url&list-type=2&prefix=pre%2Ffix%2Fpacks%2F";
    assert_eq!(fake.lines(), [format!("{base}{query}"), format!("{base}continuation-token=t%2F1&{query}")]);
}

#[test]
fn a_listing_without_end_is_corrupt() {
    let fake = Fake::new(|_, _| page(&["pre/fix/a"], Some("same")));
    assert!(matches!(block_on(store(&fake).list("")), Err(ObjectError::Corrupt(_))));
    assert_eq!(fake.lines().len(), 2);
}

#[test]
fn many_objects_are_deleted_in_batches() {
    let fake = Fake::new(|_, _| ok("<DeleteResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"></DeleteResult>"));
    let keys: Vec<String> = (0..1001).map(|i| format!("packs/{i}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    block_on(store(&fake).delete_all(&keys)).unwrap();
    assert_eq!(fake.lines(), ["POST http://store:9000/bucket/?delete="; 2]);
    let body = String::from_utf8(fake.sent()[1].body.clone()).unwrap();
    assert!(body.contains("<Object><Key>pre/fix/packs/1000</Key></Object>"), "{body}");
    assert!(fake.sent()[0].header("content-md5").is_some());
}

#[test]
fn a_batch_that_is_not_done_is_an_error_and_a_store_without_batches_deletes_one_by_one() {
    let fake = Fake::new(|_, _| {
        ok("<DeleteResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Error><Key>pre/fix/a</Key>\
            <Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>")
    });
    let error = block_on(store(&fake).delete_all(&["a"])).unwrap_err();
    assert!(matches!(&error, ObjectError::Fatal(why) if why.contains("AccessDenied")), "{error}");

    let fake = Fake::new(|number, _| if number == 0 { refusal(501, "NotImplemented") } else { answer(204, &[], "") });
    block_on(store(&fake).delete_all(&["a", "b"])).unwrap();
    let base = "http://store:9000/bucket/";
    let one = |key: &str| format!("DELETE {base}pre/fix/{key}");
    assert_eq!(fake.lines(), [format!("POST {base}?delete="), one("a"), one("b")]);
}

fn groups(names: &[&str], objects: &[&str]) -> Answer {
    let groups: String =
        names.iter().map(|n| format!("<CommonPrefixes><Prefix>{n}</Prefix></CommonPrefixes>")).collect();
    let objects: String =
        objects.iter().map(|o| format!("<Contents><Key>{o}</Key><Size>1</Size></Contents>")).collect();
    ok(&format!(
        "<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{objects}{groups}</ListBucketResult>"
    ))
}

#[test]
fn a_prefix_must_be_empty_or_ours() {
    let check = |names: &'static [&str], objects: &'static [&str]| {
        let fake = Fake::new(move |_, _| groups(names, objects));
        block_on(store(&fake).check())
    };
    for (names, objects) in
        [(&[][..], &[][..]), (&["pre/fix/packs/", "pre/fix/others/"], &["pre/fix/readme"]), (&[], &["pre/fix/"])]
    {
        assert_eq!(check(names, objects), Ok(()));
    }
    for (names, objects, found) in [(&["pre/fix/photos/"][..], &[][..], "photos/"), (&[], &["pre/fix/x.txt"], "x.txt")]
    {
        let error = check(names, objects).unwrap_err();
        assert!(matches!(&error, ObjectError::Fatal(why) if why.contains(found) && why.contains("choose")), "{error}");
    }
}

#[test]
fn an_endpoint_that_is_no_s3_service_is_told() {
    let fake = Fake::new(|_, _| answer(404, &[], "<html>not here</html>"));
    let error = block_on(store(&fake).check()).unwrap_err();
    assert!(matches!(&error, ObjectError::Fatal(why) if why.contains("correct the endpoint")), "{error}");
    let fake = Fake::new(|_, _| ok("<html>hello</html>"));
    assert!(matches!(block_on(store(&fake).check()), Err(ObjectError::Corrupt(_))));
}
