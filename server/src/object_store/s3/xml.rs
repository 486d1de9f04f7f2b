//! The text of one element of a small XML answer: errors of stores and of the token service.

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
    use super::text;

    #[test]
    fn the_text_of_an_element_is_found_and_unescaped() {
        let xml = "<Error><Code>X</Code><Message>a &lt;b&gt; &amp;lt;</Message><Empty></Empty><Open>";
        assert_eq!(text(xml, "Code").as_deref(), Some("X"));
        assert_eq!(text(xml, "Message").as_deref(), Some("a <b> &lt;"));
        assert_eq!(text(xml, "Empty").as_deref(), Some(""));
        assert_eq!((text(xml, "Open"), text(xml, "Missing")), (None, None));
    }
}
