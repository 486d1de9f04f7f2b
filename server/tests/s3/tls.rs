//! https with an authority of one's own.

use std::sync::Arc;
use std::time::Duration;

use futures_rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use futures_rustls::rustls::ServerConfig;
use futures_rustls::rustls::crypto::ring;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use volley_server::bootstrap::{self, NodeConfig};
use volley_server::object_store::s3::S3Config;
use volley_server::platform::blocking::open_store;
use volley_server::types::HydrationRate;

use crate::lab::{Lab, attached, stop, wait_hydrated};
use crate::names::NAME;
use crate::server::SECRET;

/// A server's side for 127.0.0.1 and for [`NAME`], and the certificate of its authority.
pub fn authority() -> (Arc<ServerConfig>, String) {
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("authority");
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned(), NAME.to_owned()]).expect("parameters");
    let certificate = params.signed_by(&key, &ca).expect("certificate");
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .expect("server");
    (Arc::new(config), ca.pem())
}

#[test]
fn a_bucket_behind_an_authority_of_one_s_own_is_used_and_strangers_are_refused() {
    let (server, pem) = authority();
    let mut lab = Lab::with_tls(Some(server));
    let url = "s3://images/prod";
    let strangers = lab.choice_of(url, &lab.s3, SECRET).expect("settings");
    let other = lab.path("other.pem");
    std::fs::write(&other, authority().1).expect("file");
    let others = lab.choice_of(url, &S3Config { ca_file: Some(other), ..lab.s3.clone() }, SECRET).expect("settings");
    for choice in [strangers, others] {
        let by_tool = open_store(&choice).err().expect("refused").to_string();
        let config = NodeConfig { object_store: choice, ..lab.node_config("node") };
        let by_server = bootstrap::start(config).err().expect("refused").message;
        for line in [by_tool, by_server] {
            assert!(line.contains(url) && line.contains("ca_file") && line.to_lowercase().contains("cert"), "{line}");
        }
    }

    let ca_file = lab.path("ca.pem");
    std::fs::write(&ca_file, pem).expect("file");
    lab.s3.ca_file = Some(ca_file);
    lab.import("debian").expect("import");
    let node = lab.node_with_volume("node", HydrationRate::Unlimited);
    attached(&node, async |volume| {
        for offset in [0, 5 << 20, 39 << 20] {
            lab.check(offset, &volume.read(offset as u64, 512 << 10).await.expect("read"));
        }
    });
    wait_hydrated(&node, "web-0", Duration::from_secs(60));
    stop(node);
}

#[test]
fn a_ca_file_that_is_none_is_named() {
    let lab = Lab::new();
    for (name, content) in [("missing.pem", None), ("empty.pem", Some("no certificate"))] {
        let ca_file = lab.path(name);
        if let Some(content) = content {
            std::fs::write(&ca_file, content).expect("file");
        }
        let s3 = S3Config { ca_file: Some(ca_file), ..lab.s3.clone() };
        let choice = lab.choice_of("s3://images/prod", &s3, SECRET).expect("settings");
        let by_tool = open_store(&choice).err().expect("refused").to_string();
        let config = NodeConfig { object_store: choice, ..lab.node_config("node") };
        let by_server = bootstrap::start(config).err().expect("refused").message;
        assert!(by_tool.contains(name) && by_server.contains(name), "{by_tool} {by_server}");
    }
}
