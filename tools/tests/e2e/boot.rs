//! Real Debians boot from volumes that have no data yet, two at once, and find what they wrote when they boot again.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::harness::{Agent, Process, Site, available, number, skip};

/// About 45 s on an idle machine, software emulation being what it is; CI machines have other things to do.
const BOOT_TIMEOUT: Duration = Duration::from_secs(360);
/// After its marker the guest powers off.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(120);

/// The image that tools/test made.
fn debian_image() -> Option<PathBuf> {
    let path = std::env::var_os("VOLLEY_DEBIAN_IMAGE").map(PathBuf::from).filter(|p| p.exists());
    if path.is_none() {
        skip("VOLLEY_DEBIAN_IMAGE names no image; tools/test makes one");
    }
    path
}

/// Starts a VM on a volume; what it prints on its serial console are the process's lines.
fn boot(agent: &Agent, volume: &str) -> Process {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "1024", "-nographic", "-no-reboot", "-nic", "none"]);
    qemu.args(["-monitor", "none", "-serial", "stdio"]);
    let file = agent.qemu_file(volume);
    // werror/rerror: an I/O error reaches the guest instead of pausing the VM for ever.
    qemu.args(["-drive", &format!("file={file},format=raw,if=virtio,cache=none,werror=report,rerror=report")]);
    Process::spawn("guest", qemu)
}

fn wait_marker(guest: &mut Process) -> String {
    let line = guest.wait_line(BOOT_TIMEOUT, |line| line.contains("BOOT-OK"));
    for sign in ["I/O error", "EXT4-fs error", "Buffer I/O"] {
        assert!(!guest.log().contains(sign), "the guest saw {sign:?}");
    }
    line
}

#[test]
fn two_debians_boot_at_once_from_empty_volumes_and_find_what_they_wrote() {
    if !available(&["qemu-system-x86_64"]) {
        return;
    }
    let Some(image) = debian_image() else { return };
    let site = Site::new();
    site.import(&image, "debian-12");
    let node = site.start_default();
    node.create(&site, "debian-12", 3, "web-");
    let agent = site.agent("agent", &[]);
    let untouched = number(&node.volume(&site, "web-2"), "remaining_bytes");

    let mut guests = ["web-0", "web-1"].map(|volume| (volume, boot(&agent, volume)));
    for (volume, guest) in &mut guests {
        let marker = wait_marker(guest);
        let shown = node.volume(&site, volume);
        let (remaining, size) = (number(&shown, "remaining_bytes"), number(&shown, "size_bytes"));
        println!("{volume}: {marker}: {} of {untouched} bytes of data fetched, device {size}", untouched - remaining);
        // Lazy: it booted with less than 40 % of the image's data.
        assert!(untouched - remaining < untouched * 2 / 5, "{shown}");
        // Each has its own disk: neither sees the other's boot.
        assert!(marker.contains("boots=1"), "{marker}");
    }
    for (_, guest) in &mut guests {
        assert!(guest.wait(POWER_OFF_TIMEOUT).success(), "the guest powers off");
    }

    node.kill();
    let node = site.start_default();
    let mut guest = boot(&agent, "web-0");
    let marker = wait_marker(&mut guest);
    assert!(marker.contains("boots=2"), "what the first boot wrote is gone: {marker}");
    assert!(guest.wait(POWER_OFF_TIMEOUT).success(), "the guest powers off");
    assert_eq!(node.volume(&site, "web-2")["read_misses"], 0, "the third volume was not touched");
}
