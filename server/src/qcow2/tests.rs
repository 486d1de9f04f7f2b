//! Files of the writer, read by the real qemu-img.
#![allow(clippy::disallowed_methods)] // Tests run outside of any shard.

use std::fs;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const CLUSTER: usize = CLUSTER_BYTES as usize;
/// Of a snapshot: two clusters.
const CHUNK: usize = 2 * CLUSTER;

fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).current_dir(dir).output().expect("install qemu-utils");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "qemu-img {args:?}: {text}");
    text
}

/// A device whose clusters are zero (0) or noise of a seed; the last is cut by `cut` sectors.
fn device(seeds: &[u8], cut: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for seed in seeds {
        let mut cluster = vec![0; CLUSTER];
        if *seed != 0 {
            blake3::Hasher::new().update(&[*seed]).finalize_xof().fill(&mut cluster);
        }
        bytes.extend(cluster);
    }
    bytes.truncate(bytes.len() - 512 * cut);
    bytes
}

/// Writes the chunks of `new` that differ from `old`; without one, those with data.
fn write(file: &File, new: &[u8], old: Option<&[u8]>, backing: Option<Backing>) -> u64 {
    let mut writer = Writer::new(file, new.len() as u64, backing).unwrap();
    for (number, chunk) in new.chunks(CHUNK).enumerate() {
        let at = number * CHUNK;
        match old {
            Some(old) if old[at..at + chunk.len()] == *chunk => {}
            None if is_zero(chunk) => {}
            _ if is_zero(chunk) => writer.zeroes(at as u64, chunk.len() as u32).unwrap(),
            _ => writer.data(at as u64, chunk).unwrap(),
        }
    }
    writer.finish().unwrap()
}

fn read_back(dir: &Path, name: &str) -> Vec<u8> {
    let checked = qemu_img(dir, &["check", name]);
    assert!(checked.contains("No errors were found"), "{checked}");
    qemu_img(dir, &["convert", "-f", "qcow2", "-O", "raw", name, "out.raw"]);
    fs::read(dir.join("out.raw")).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn an_overlay_over_its_backing_file_is_the_new_device(
        pair in prop::collection::vec((0u8..4, 0u8..4), 1..24),
        cut in 0usize..128,
        raw in any::<bool>(),
    ) {
        let (new, old): (Vec<u8>, Vec<u8>) = pair.into_iter().unzip();
        let (new, old) = (device(&new, cut), device(&old, cut));
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (name, format) = if raw { ("old.raw", ImageFormat::Raw) } else { ("old.qcow2", ImageFormat::Qcow2) };
        match format {
            ImageFormat::Raw => fs::write(path(name), &old).unwrap(),
            ImageFormat::Qcow2 => {
                write(&File::create(path(name)).unwrap(), &old, None, None);
                prop_assert!(read_back(dir.path(), name) == old);
            }
        }
        let backing = Backing { name: name.to_owned(), format };
        let len = write(&File::create(path("new.qcow2")).unwrap(), &new, Some(&old), Some(backing));
        prop_assert_eq!(fs::metadata(path("new.qcow2")).unwrap().len(), len);
        prop_assert!(read_back(dir.path(), "new.qcow2") == new);
    }
}

#[test]
fn an_image_of_several_tables_holds_only_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let table = CLUSTER_BYTES * L2_ENTRIES;
    let size = 3 * table + 1024;
    let chunk = device(&[1, 2, 3, 4], 0);
    let file = File::create(dir.path().join("a.qcow2")).unwrap();
    let mut writer = Writer::new(&file, size, None).unwrap();
    // Over the border of two tables, and at the end of the device.
    writer.data(table - 2 * CLUSTER_BYTES, &chunk).unwrap();
    writer.data(3 * table, &chunk[..1024]).unwrap();
    let len = writer.finish().unwrap();
    assert_eq!(len / CLUSTER_BYTES, 1 + 5 + 3 + 1 + 2, "header, data, L2 tables, L1 table, reference counts");
    assert!(qemu_img(dir.path(), &["check", "a.qcow2"]).contains("No errors were found"));
    let expected = File::create(dir.path().join("expected.raw")).unwrap();
    expected.set_len(size).unwrap();
    expected.write_all_at(&chunk, table - 2 * CLUSTER_BYTES).unwrap();
    expected.write_all_at(&chunk[..1024], 3 * table).unwrap();
    qemu_img(dir.path(), &["compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "expected.raw"]);
}

#[test]
fn reference_counts_count_themselves() {
    for used in [1, 2, REFCOUNTS - 2, REFCOUNTS - 1, REFCOUNTS, 10 * REFCOUNTS, REFCOUNTS * L2_ENTRIES] {
        let counts = Counts::of(used);
        assert_eq!(counts.clusters, used + counts.blocks + counts.table_clusters);
        assert!(counts.blocks * REFCOUNTS >= counts.clusters && counts.table_clusters * L2_ENTRIES >= counts.blocks);
        assert!((counts.blocks - 1) * REFCOUNTS < counts.clusters);
    }
}

#[test]
fn names_that_no_header_holds_are_refused() {
    let file = tempfile::tempfile().unwrap();
    for len in [0, BACKING_NAME_BYTES_MAX + 1] {
        let backing = Backing { name: "x".repeat(len), format: ImageFormat::Raw };
        assert!(Writer::new(&file, 512, Some(backing)).is_err());
    }
}
