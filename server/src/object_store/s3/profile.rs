//! Profiles of the shared files `~/.aws/credentials` and `~/.aws/config`: sections of `key = value` lines.

use std::collections::BTreeMap;

/// The settings of one profile, of both files together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Profile {
    pub(super) name: String,
    values: BTreeMap<String, String>,
}

impl Profile {
    /// Collects a profile from the files; what stands in a later one wins.
    pub(super) fn find(name: &str, texts: &[String]) -> Option<Profile> {
        let mut found = false;
        let mut values = BTreeMap::new();
        for line in texts.iter().flat_map(|text| in_section(name, text)) {
            match line {
                Line::Header => found = true,
                Line::Setting(key, value) => drop(values.insert(key.to_ascii_lowercase(), value.to_owned())),
            }
        }
        found.then(|| Profile { name: name.to_owned(), values })
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }
}

enum Line<'a> {
    Header,
    Setting(&'a str, &'a str),
}

/// The header and the settings of one profile in one file. Nested settings (indented lines) belong to others.
fn in_section<'a>(name: &'a str, text: &'a str) -> impl Iterator<Item = Line<'a>> {
    let mut inside = false;
    text.lines().filter_map(move |line| {
        let trimmed = line.trim();
        if let Some(section) = trimmed.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            let section = section.trim();
            // The configuration file writes `[profile NAME]`, the credentials file `[NAME]`.
            inside = section.strip_prefix("profile ").map_or(section, str::trim) == name;
            return inside.then_some(Line::Header);
        }
        if !inside || trimmed.starts_with(['#', ';']) || line.starts_with([' ', '\t']) {
            return None;
        }
        trimmed.split_once('=').map(|(key, value)| Line::Setting(key.trim(), value.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::Profile;

    #[test]
    fn a_profile_is_collected_from_both_files() {
        let config =
            "# c\n[default]\nregion = r0\n[profile dev]\nregion=r1\ns3 =\n  region = nested\n[other]\nregion=r2\n";
        let credentials = "[dev]\nAWS_ACCESS_KEY_ID = a=b \n; no = comment\n[default]\naws_access_key_id=d\n";
        let texts = [config.to_owned(), credentials.to_owned()];
        let dev = Profile::find("dev", &texts).unwrap();
        assert_eq!((dev.get("region"), dev.get("aws_access_key_id")), (Some("r1"), Some("a=b")));
        assert_eq!((dev.get("s3"), dev.get("no")), (None, None));
        assert_eq!(Profile::find("default", &texts).unwrap().get("region"), Some("r0"));
        assert_eq!(Profile::find("none", &texts), None);
    }
}
