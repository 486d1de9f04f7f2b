//! Puts: checksums, parts, and the condition that lets one of many win.

use std::cell::Cell;

use futures::executor::block_on;

use super::*;
use crate::object_store::s3::transport::HttpErrorKind;

const LARGE_BYTES: usize = 40 << 20;

fn is_conditional(sent: &Sent) -> bool {
    sent.header("if-none-match") == Some("*")
}

#[test]
fn a_put_carries_its_checksum() {
    let fake = Fake::new(|_, _| ok(""));
    block_on(store(&fake).put("a", b"foobar")).unwrap();
    let sent = &fake.sent()[0];
    assert_eq!((sent.line().as_str(), &sent.body[..]), ("PUT http://store:9000/bucket/pre/fix/a", &b"foobar"[..]));
    assert_eq!(sent.header("content-md5"), Some("OFj2IjCsPJFfMAxmQxLGPw=="));
    assert!(!is_conditional(sent));
}

#[test]
fn a_store_that_honours_the_condition_is_found_out_once() {
    let fake = Fake::new(|_, sent| match sent.method {
        Method::Head => refusal(404, ""),
        _ if sent.target.ends_with("taken") => refusal(412, "PreconditionFailed"),
        _ => ok(""),
    });
    // The trial is the second put of the same key.
    let seen = Cell::new(false);
    let fake = Fake {
        answer: Rc::new(move |number, sent| {
            let again = sent.method == Method::Put && sent.target.ends_with("/a") && seen.replace(true);
            if again { refusal(412, "PreconditionFailed") } else { (fake.answer)(number, sent) }
        }),
        ..Fake::new(|_, _| ok(""))
    };
    let store = store(&fake);
    assert_eq!(store.honours_conditional_put(), None);
    block_on(store.put_if_absent("a", b"1")).unwrap();
    assert_eq!(store.honours_conditional_put(), Some(true));
    block_on(store.put_if_absent("b", b"2")).unwrap();
    assert_eq!(block_on(store.put_if_absent("taken", b"3")), Err(ObjectError::AlreadyExists("taken".to_owned())));
    let methods: Vec<Method> = fake.sent().iter().map(|sent| sent.method).collect();
    assert_eq!(methods, [Method::Head, Method::Put, Method::Put, Method::Put, Method::Put]);
    assert!(fake.sent()[1..].iter().all(is_conditional));
}

#[test]
fn a_store_that_ignores_the_condition_is_found_out_and_looked_at_before_each_put() {
    let fake = Fake::new(|_, sent| match sent.method {
        Method::Head if sent.target.ends_with("taken") => ok(""),
        Method::Head => refusal(404, ""),
        _ => ok(""),
    });
    let store = store(&fake);
    block_on(store.put_if_absent("a", b"1")).unwrap();
    assert_eq!(store.honours_conditional_put(), Some(false));
    assert_eq!(block_on(store.put_if_absent("taken", b"3")), Err(ObjectError::AlreadyExists("taken".to_owned())));
    assert_eq!(fake.sent().last().unwrap().method, Method::Head, "nothing was overwritten");
    block_on(store.put_if_absent("c", b"3")).unwrap();
    assert!(!is_conditional(fake.sent().last().unwrap()));
}

#[test]
fn a_store_without_conditional_puts_is_looked_at_before_each_put() {
    let fake = Fake::new(|_, sent| match sent.method {
        Method::Head => refusal(404, ""),
        _ if is_conditional(sent) => refusal(501, "NotImplemented"),
        _ => ok(""),
    });
    let store = store(&fake);
    block_on(store.put_if_absent("a", b"1")).unwrap();
    block_on(store.put_if_absent("b", b"1")).unwrap();
    assert_eq!(fake.sent().iter().filter(|sent| is_conditional(sent)).count(), 1, "asked once");
    assert_eq!(store.honours_conditional_put(), Some(false));
    let off = S3Config { conditional_put: ConditionalPut::Off, ..config() };
    block_on(store_with(&fake, &off).put_if_absent("c", b"1")).unwrap();
    assert_eq!(fake.sent().iter().filter(|sent| is_conditional(sent)).count(), 1, "switched off");
}

/// The answer of the first put is lost; the second finds an object. `ours`: it is the one of the first.
fn after_a_lost_answer(ours: bool) -> Result<(), ObjectError> {
    let fake = Fake::new(|_, sent| if sent.method == Method::Head { refusal(404, "") } else { ok("") });
    let mark = RefCell::new(String::new());
    let fake = Fake {
        answer: Rc::new(move |number, sent| match (number, sent.method) {
            (0, Method::Head) => refusal(404, ""),
            (1, Method::Put) => {
                *mark.borrow_mut() = sent.header("x-amz-meta-volley-put").unwrap().to_owned();
                Err(HttpError::new(HttpErrorKind::Timeout, "lost"))
            }
            (_, Method::Put) => refusal(412, "PreconditionFailed"),
            _ if ours => answer(200, &[("x-amz-meta-volley-put", &mark.borrow())], ""),
            _ => answer(200, &[("x-amz-meta-volley-put", "somebody else's")], ""),
        }),
        ..fake
    };
    block_on(store(&fake).put_if_absent("a", b"1"))
}

#[test]
fn a_put_whose_answer_was_lost_knows_its_object_by_the_mark() {
    assert_eq!(after_a_lost_answer(true), Ok(()));
    assert_eq!(after_a_lost_answer(false), Err(ObjectError::AlreadyExists("a".to_owned())));
}

#[test]
fn a_race_that_the_store_calls_a_conflict_is_run_again() {
    let fake = Fake::new(|number, sent| match (number, sent.method) {
        (_, Method::Head) => refusal(404, ""),
        (1, _) => refusal(409, "ConditionalRequestConflict"),
        _ => refusal(412, "PreconditionFailed"),
    });
    assert_eq!(block_on(store(&fake).put_if_absent("a", b"1")), Err(ObjectError::AlreadyExists("a".to_owned())));
}

fn multipart(complete: impl Fn() -> Answer + 'static) -> Fake {
    Fake::new(move |_, sent| match sent.method {
        Method::Post if sent.target.contains("uploads=") => {
            ok("<InitiateMultipartUploadResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
                <UploadId>U&amp;1</UploadId></InitiateMultipartUploadResult>")
        }
        Method::Put if sent.target.contains("partNumber=") => {
            answer(200, &[("etag", &format!("\"etag{}\"", sent.body.len()))], "")
        }
        Method::Post => complete(),
        Method::Head => refusal(404, ""),
        _ => answer(204, &[], ""),
    })
}

#[test]
fn large_objects_go_up_in_parts_and_appear_at_the_end() {
    let fake = multipart(|| ok("<CompleteMultipartUploadResult></CompleteMultipartUploadResult>"));
    let data = vec![5; LARGE_BYTES];
    block_on(store(&fake).put_if_absent("packs/p", &data)).unwrap();
    let sent = fake.sent();
    let object = "http://store:9000/bucket/pre/fix/packs/p";
    let part = |n| format!("PUT {object}?partNumber={n}&uploadId=U%261");
    let expected = [
        format!("HEAD {object}"),
        format!("POST {object}?uploads="),
        part(1),
        part(2),
        part(3),
        format!("POST {object}?uploadId=U%261"),
    ];
    assert_eq!(fake.lines(), expected);
    assert!(sent[2..5].iter().all(|part| part.header("content-md5").is_some()));
    assert!(is_conditional(&sent[5]) && sent[1].header("x-amz-meta-volley-put").is_some());
    let body = String::from_utf8(sent[5].body.clone()).unwrap();
    assert!(body.contains("<PartNumber>3</PartNumber><ETag>&quot;etag8388608&quot;</ETag>"), "{body}");
}

#[test]
fn an_upload_that_fails_is_given_up_even_if_the_failure_comes_with_200() {
    for complete in [|| refusal(403, "AccessDenied"), || ok("<Error><Code>InternalError</Code></Error>")] {
        let fake = multipart(complete);
        let error = block_on(store(&fake).put("packs/p", &vec![5; LARGE_BYTES])).unwrap_err();
        assert!(matches!(error, ObjectError::Fatal(_) | ObjectError::Retry(_)), "{error}");
        assert!(fake.lines().last().unwrap().starts_with("DELETE "), "{:?}", fake.lines());
    }
}
