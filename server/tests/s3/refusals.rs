//! What is set wrongly is refused at the start, by tools and by the server, in one line that names place, cause and remedy.

use volley_server::bootstrap::{self, NodeConfig};
use volley_server::object_store::any::StoreChoice;
use volley_server::object_store::s3::S3Config;
use volley_server::platform::blocking::open_store;

use crate::lab::Lab;
use crate::proxy::Fault;
use crate::server::SECRET;

/// Tool and server refuse to start on this store, in the same words.
fn refused(lab: &Lab, choice: &StoreChoice, words: &[&str]) {
    let by_tool = open_store(choice).err().expect("refused by the tool").to_string();
    let config = NodeConfig { object_store: choice.clone(), ..lab.node_config("node") };
    let by_server = bootstrap::start(config).err().expect("refused by the server").message;
    for line in [by_tool, by_server] {
        assert!(!line.contains('\n'), "one line: {line}");
        for word in words {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
    }
}

#[test]
fn what_is_set_wrongly_is_named() {
    let lab = Lab::new();
    let endpoint = lab.s3.endpoint.clone().expect("given");
    let choice = |url: &str, s3: &S3Config, secret: &str| lab.choice_of(url, s3, secret).expect("settings");
    let wrong_keys = choice("s3://images/prod", &lab.s3, "another secret");
    refused(&lab, &wrong_keys, &["s3://images/prod", &endpoint, "the credentials from the environment are wrong"]);

    refused(&lab, &choice("s3://nobody/prod", &lab.s3, SECRET), &["s3://nobody/prod", &endpoint, "does not exist"]);

    let anonymous = S3Config { anonymous: true, ..lab.s3.clone() };
    refused(
        &lab,
        &choice("s3://images", &anonymous, SECRET),
        &["s3://images", "anonymous requests", "give credentials"],
    );

    // A port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").to_string();
    let nobody = S3Config { endpoint: Some(format!("http://{free}")), ..lab.s3.clone() };
    refused(&lab, &choice("s3://images", &nobody, SECRET), &["s3://images", &free, "refused", "check the endpoint"]);

    let nowhere = S3Config { endpoint: Some("http://no-such-host.invalid".to_owned()), ..lab.s3.clone() };
    refused(&lab, &choice("s3://images", &nowhere, SECRET), &["no-such-host.invalid", "check the endpoint"]);

    std::fs::create_dir_all(lab.server.bucket().join("photos")).expect("folder");
    std::fs::write(lab.server.bucket().join("photos/cat.jpg"), b"meow").expect("photo");
    refused(&lab, &choice("s3://images", &lab.s3, SECRET), &["holds something else", "photos/", "choose"]);
    refused(&lab, &choice("s3://images/photos", &lab.s3, SECRET), &["holds something else", "cat.jpg"]);
    open_store(&lab.choice()).expect("another prefix is fine");
}

#[test]
fn what_the_store_says_no_to_is_named() {
    let lab = Lab::new();
    let choice = lab.choice();
    for (status, code, words) in [
        (403, "RequestTimeTooSkewed", ["clock", "NTP"]),
        (400, "ExpiredToken", ["has expired", "renew"]),
        (403, "AccessDenied", ["s3:ListBucket", "grant"]),
    ] {
        lab.proxy.fail("", Fault::Status(status, code), usize::MAX);
        refused(&lab, &choice, &[&["s3://images/prod", "http://127.0.0.1", code][..], &words].concat());
        lab.proxy.heal();
    }
    // A store that is only busy is waited for.
    lab.proxy.fail("", Fault::Status(503, "SlowDown"), 2);
    open_store(&choice).expect("open");
}

#[test]
fn an_import_without_permission_to_write_leaves_nothing_and_says_so() {
    let lab = Lab::new();
    lab.proxy.fail("PUT ", Fault::Status(403, "AccessDenied"), usize::MAX);
    let error = lab.import("debian").unwrap_err();
    assert!(error.contains("s3://images/prod at http://127.0.0.1") && error.contains("lack s3:PutObject"), "{error}");
    assert!(crate::server::files_below(&lab.server.bucket()).is_empty());
}
