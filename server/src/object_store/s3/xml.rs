//! XML answers of stores: the text of one element, and the namespace that not all of them write.

/// What `rusty-s3` reads; some stores write another one, or none.
const NAMESPACE: &str = "http://s3.amazonaws.com/doc/2006-03-01/";

/// The document with its root element in the namespace of S3.
pub(super) fn in_namespace(xml: &str) -> String {
    let root = xml.match_indices('<').find(|(at, _)| !xml[at + 1..].starts_with(['?', '!'])).map(|(at, _)| at);
    let Some((start, len)) = root.and_then(|start| Some((start, xml[start..].find('>')?))) else {
        return xml.to_owned();
    };
    let tag = &xml[start..start + len];
    let (tag, close) = tag.strip_suffix('/').map_or((tag, ""), |tag| (tag, "/"));
    let tag = match tag.find(" xmlns=") {
        None => tag.to_owned(),
        Some(at) => {
            let value = &tag[at + " xmlns=".len()..];
            let quote = value.chars().next().unwrap_or('"');
            let value_len = value.get(1..).and_then(|rest| rest.find(quote)).map_or(value.len(), |end| end + 2);
            format!("{}{}", &tag[..at], &value[value_len..])
        }
    };
    format!("{}{tag} xmlns=\"{NAMESPACE}\"{close}{}", &xml[..start], &xml[start + len..])
}

/// Text of the first element `<tag>`, with the five predefined entities resolved; `None` without one.
pub(super) fn text(xml: &str, tag: &str) -> Option<String> {
    let open = format!("<{tag}>");
    let start = xml.find(&open)? + open.len();
    let len = xml[start..].find("</")?;
    let raw = xml[start..start + len].trim();
    // `&amp;` last, so that nothing is resolved twice.
    let entities = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&#34;", "\""), ("&amp;", "&")];
    Some(entities.iter().fold(raw.to_owned(), |text, (entity, plain)| text.replace(entity, plain)))
}

#[cfg(test)]
mod tests {
    use super::{in_namespace, text};

    #[test]
    fn the_root_element_gets_the_namespace_whatever_it_had() {
        let ours = "xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"";
        for (given, expected) in [
            ("<?xml version=\"1.0\"?>\n<A><B/></A>", format!("<?xml version=\"1.0\"?>\n<A {ours}><B/></A>")),
            ("<A xmlns=\"http://other/\"><B/></A>", format!("<A {ours}><B/></A>")),
            ("<A xmlns='x' b=\"c\"></A>", format!("<A b=\"c\" {ours}></A>")),
            ("<A/>", format!("<A {ours}/>")),
            ("no markup", "no markup".to_owned()),
            ("<unfinished", "<unfinished".to_owned()),
            ("<A xmlns=", "<A xmlns=".to_owned()),
            ("<A xmlns=>", format!("<A {ours}>")),
        ] {
            assert_eq!(in_namespace(given), expected);
        }
    }

    #[test]
    fn the_text_of_an_element_is_found_and_unescaped() {
        let xml = "<Error><Code>X</Code><Message>a &lt;b&gt; &amp;lt;</Message><Empty></Empty><Open>";
        assert_eq!(text(xml, "Code").as_deref(), Some("X"));
        assert_eq!(text(xml, "Message").as_deref(), Some("a <b> &lt;"));
        assert_eq!(text(xml, "Empty").as_deref(), Some(""));
        assert_eq!((text(xml, "Open"), text(xml, "Missing")), (None, None));
    }
}
