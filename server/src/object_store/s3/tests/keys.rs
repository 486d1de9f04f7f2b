//! Credentials: which source applies, how keys are fetched, and when they are renewed.
#![allow(clippy::disallowed_methods)] // Profile files of the test.

use futures::executor::block_on;

use super::*;
use crate::object_store::s3::credentials::Source;
use crate::object_store::s3::transport::HttpErrorKind;

fn resolve(config: &S3Config, variables: &[(&str, &str)]) -> Result<S3Settings, String> {
    S3Settings::resolve(&location("s3://bucket"), config, &env(variables))
}

fn source(variables: &[(&str, &str)]) -> Result<String, String> {
    resolve(&config(), variables).map(|settings| settings.credentials.to_string())
}

#[test]
fn the_first_source_that_applies_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let credentials = dir.path().join("credentials");
    let text = "[default]\naws_access_key_id=a\naws_secret_access_key=b\n[sso]\nsso_session=x\n\
                [web]\nweb_identity_token_file=/t\nrole_arn=arn:r\n";
    std::fs::write(&credentials, text).unwrap();
    let file = ("AWS_SHARED_CREDENTIALS_FILE", credentials.to_str().unwrap());
    let web = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn:env")];
    let all = [&KEYS[..], &web, &[file]].concat();
    assert_eq!(source(&all).unwrap(), "the environment");
    assert_eq!(source(&[&web[..], &[file]].concat()).unwrap(), "the web identity of arn:env");
    assert_eq!(source(&[file]).unwrap(), "profile \"default\"");
    assert_eq!(source(&[file, ("AWS_PROFILE", "web")]).unwrap(), "the web identity of arn:r");
    let container = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/x");
    assert_eq!(source(&[container]).unwrap(), "the container's endpoint");
    assert_eq!(source(&[]).unwrap(), "the instance's metadata");
    let anonymous = S3Config { anonymous: true, ..config() };
    assert_eq!(resolve(&anonymous, &all).unwrap().credentials, Source::Anonymous);
    for (variables, why) in [
        (vec![("AWS_ACCESS_KEY_ID", "a")], "set both"),
        (vec![file, ("AWS_PROFILE", "nobody")], "\"nobody\" is not in"),
        (vec![file, ("AWS_PROFILE", "sso")], "sso_session, which is not supported"),
        (vec![("AWS_EC2_METADATA_DISABLED", "true")], "no credentials: set AWS_ACCESS_KEY_ID"),
    ] {
        let error = source(&variables).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let text = format!("{:?}", settings(&config()));
    assert!(!text.contains("SK") && !text.contains("AK"), "{text}");
}

#[test]
fn the_configuration_goes_before_the_environment_and_that_before_the_profile() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config");
    std::fs::write(&file, "[default]\nregion=of-profile\nendpoint_url=http://of-profile\n").unwrap();
    let profile = ("AWS_CONFIG_FILE", file.to_str().unwrap());
    let env =
        [("AWS_REGION", "of-env"), ("AWS_ENDPOINT_URL", "http://of-env"), ("AWS_ENDPOINT_URL_S3", "http://of-s3")];
    let of = |config: &S3Config, variables: &[(&str, &str)]| {
        let all = [&KEYS[..], variables].concat();
        let settings = resolve(config, &all).unwrap();
        (settings.region, settings.endpoint, settings.path_style)
    };
    let expect = |region: &str, endpoint: &str, path| (region.to_owned(), endpoint.to_owned(), path);
    let none = S3Config::default();
    assert_eq!(of(&none, &[]), expect("us-east-1", "https://s3.us-east-1.amazonaws.com", false));
    assert_eq!(of(&none, &[profile]), expect("of-profile", "http://of-profile", true));
    assert_eq!(of(&none, &[&env[..], &[profile]].concat()), expect("of-env", "http://of-s3", true));
    let given = S3Config { region: Some("given".to_owned()), ..config() };
    assert_eq!(of(&given, &env), expect("given", "http://store:9000", true));
}

fn expiring(in_seconds: i64) -> String {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(in_seconds);
    at.to_string()
}

fn store_of(fake: &Fake, variables: &[(&str, &str)]) -> S3Store<Blocking, Fake> {
    S3Store::new(Blocking, fake.clone(), resolve(&config(), variables).unwrap(), POLICY).unwrap()
}

fn document(key: &str, in_seconds: i64) -> Answer {
    let at = expiring(in_seconds);
    ok(&format!("{{\"AccessKeyId\":\"{key}\",\"SecretAccessKey\":\"s\",\"Token\":\"t\",\"Expiration\":\"{at}\"}}"))
}

#[test]
fn the_instance_is_asked_with_a_token_once() {
    let fake = Fake::new(|_, sent| match sent.target.strip_prefix("http://169.254.169.254/latest/") {
        Some("api/token") => {
            assert!(sent.method == Method::Put && sent.header("x-aws-ec2-metadata-token-ttl-seconds").is_some());
            ok("TOKEN")
        }
        Some(path) => {
            assert_eq!(sent.header("x-aws-ec2-metadata-token"), Some("TOKEN"));
            if path.ends_with("role-1") { document("IK", 3600) } else { ok("role-1\n") }
        }
        None => ok("x"),
    });
    let store = store_of(&fake, &[]);
    block_on(store.get("a")).unwrap();
    block_on(store.get("b")).unwrap();
    let sent = fake.sent();
    assert_eq!(sent.len(), 3 + 2, "the keys are kept");
    assert!(sent[4].url.contains("X-Amz-Credential=IK%2F") && sent[4].url.contains("X-Amz-Security-Token=t"));
}

#[test]
fn keys_are_renewed_before_they_expire_and_used_while_that_fails() {
    let fake = Fake::new(|number, sent| match (sent.target.contains("/creds"), number) {
        (true, 0) => document("OLD", 60),
        (true, 2) => Err(HttpError::new(HttpErrorKind::Unreachable, "down")),
        (true, _) => document("NEW", 3600),
        (false, _) => ok("x"),
    });
    let container = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1/creds")];
    let store = store_of(&fake, &container);
    // The first keys are nearly over, so the second request tries to renew them, and goes on with the old ones.
    block_on(store.get("a")).unwrap();
    block_on(store.get("b")).unwrap();
    let signed_by = |i: usize, key: &str| fake.sent()[i].url.contains(&format!("X-Amz-Credential={key}%2F"));
    assert!(signed_by(1, "OLD") && signed_by(3, "OLD"));
}

#[test]
fn expired_keys_are_fetched_anew_at_once() {
    let fake = Fake::new(|number, sent| match (sent.target.contains("/creds"), number) {
        (true, 0) => document("OLD", 7200),
        (true, _) => document("NEW", 7200),
        (false, _) if sent.url.contains("=OLD%2F") => refusal(400, "ExpiredToken"),
        (false, _) => ok("x"),
    });
    let store = store_of(&fake, &[("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1/creds")]);
    assert_eq!(block_on(store.get("a")).unwrap(), b"x");
    assert_eq!(fake.lines().len(), 4);
    // Keys of the environment can't be had anew: one line, no second attempt.
    let fake = Fake::new(|_, _| refusal(400, "ExpiredToken"));
    let error = block_on(store_of(&fake, &KEYS).get("a")).unwrap_err();
    assert!(matches!(&error, ObjectError::Fatal(why) if why.contains("from the environment has expired")), "{error}");
    assert_eq!(fake.lines().len(), 1);
}

#[test]
fn a_web_identity_is_exchanged_for_keys() {
    let mut fake = Fake::new(|_, sent| {
        if !sent.target.starts_with("http://sts/") {
            return ok("x");
        }
        let form = String::from_utf8(sent.body.clone()).unwrap();
        assert!(form.contains("RoleArn=arn%3Ar&") && form.contains("WebIdentityToken=jwt%2F1"), "{form}");
        let at = expiring(3600);
        ok(&format!(
            "<R><Credentials><AccessKeyId>WK</AccessKeyId><SecretAccessKey>s</SecretAccessKey>\
             <SessionToken>t</SessionToken><Expiration>{at}</Expiration></Credentials></R>"
        ))
    });
    fake.files.insert("/token".into(), "jwt/1\n".to_owned());
    let variables =
        [("AWS_WEB_IDENTITY_TOKEN_FILE", "/token"), ("AWS_ROLE_ARN", "arn:r"), ("AWS_ENDPOINT_URL_STS", "http://sts")];
    block_on(store_of(&fake, &variables).get("a")).unwrap();
    assert!(fake.sent()[1].url.contains("X-Amz-Credential=WK%2F"));
    fake.files.clear();
    let error = block_on(store_of(&fake, &variables).get("a")).unwrap_err().to_string();
    assert!(error.contains("web identity token /token"), "{error}");
}

#[test]
fn without_any_credentials_the_line_says_what_to_set() {
    let fake = Fake::new(|_, _| Err(HttpError::new(HttpErrorKind::Unreachable, "no route")));
    let error = block_on(store_of(&fake, &[]).check()).unwrap_err().to_string();
    assert!(error.contains("s3://bucket at http://store:9000") && error.contains("AWS_ACCESS_KEY_ID"), "{error}");
}
