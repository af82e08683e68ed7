//! `STARTTLS` on both sides: what is said before it, that nothing of that is kept, and that nobody goes on without.

use super::*;
use crate::nbd::client::{Allocation, Negotiation, NegotiationError, Wish};
use crate::nbd::handshake::TlsPolicy;
use crate::nbd::wire::{INIT_PASSWD, opt, rep};

fn server(exports: &[Offer], policy: TlsPolicy) -> Server<'_> {
    let Server { handshake, offers, output } = Server::new(exports);
    Server { handshake: handshake.with_tls(policy), offers, output }
}

fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|(kind, _)| *kind).collect()
}

#[test]
fn a_server_that_requires_tls_tells_nothing_before() {
    let exports = [offer("secret")];
    let context = context_bytes("secret", &["base:allocation"]);
    for (option, data) in [
        (opt::LIST, vec![]),
        (opt::INFO, query_bytes("secret", &[])),
        (opt::GO, query_bytes("secret", &[])),
        (opt::GO, query_bytes("none", &[])),
        (opt::STRUCTURED_REPLY, vec![]),
        (opt::LIST_META_CONTEXT, context.clone()),
        (opt::SET_META_CONTEXT, context),
        (0xdead_beef, vec![1; 9]),
    ] {
        let mut server = server(&exports, TlsPolicy::Required);
        assert_eq!(kinds(&server.ask(option, &data)), [rep::ERR_TLS_REQD], "option {option:#x}");
    }
    let mut server = server(&exports, TlsPolicy::Required);
    let long = vec![0; crate::limits::NBD_OPTION_LEN_MAX + 1];
    let mut input = option_bytes(opt::LIST, &long).freeze();
    while !input.is_empty() {
        assert_eq!(server.handshake.step(&mut input, server.offers, &mut server.output), Ok(Step::Answered));
    }
    assert_eq!(kinds(&server.replies(opt::LIST)), [rep::ERR_TLS_REQD], "a long option");
    assert_eq!(server.send(opt::EXPORT_NAME, b"secret"), Err(Violation::TlsRequired));
    assert!(server.output.is_empty());
}

#[test]
fn a_server_that_requires_tls_lets_a_client_leave() {
    let mut server = server(&[], TlsPolicy::Required);
    assert_eq!(server.send(opt::ABORT, &[]), Ok(Step::Aborted));
}

#[test]
fn a_server_without_tls_says_that_it_is_its_policy_and_goes_on() {
    let exports = [offer("a")];
    let mut server = server(&exports, TlsPolicy::None);
    assert_eq!(kinds(&server.ask(opt::STARTTLS, &[])), [rep::ERR_POLICY]);
    server.go("a");
}

#[test]
fn a_server_that_offers_tls_takes_a_client_that_does_not_ask() {
    let exports = [offer("a")];
    server(&exports, TlsPolicy::Optional).go("a");
}

#[test]
fn tls_is_set_up_once_and_without_data() {
    for policy in [TlsPolicy::Optional, TlsPolicy::Required] {
        let exports = [offer("a")];
        let mut server = server(&exports, policy);
        assert_eq!(kinds(&server.ask(opt::STARTTLS, &[0])), [rep::ERR_INVALID]);
        assert_eq!(server.send(opt::STARTTLS, &[]), Ok(Step::StartTls));
        assert_eq!(kinds(&server.replies(opt::STARTTLS)), [rep::ACK]);
        assert_eq!(kinds(&server.ask(opt::STARTTLS, &[])), [rep::ERR_INVALID]);
        server.go("a");
    }
}

#[test]
fn what_was_agreed_on_in_plain_text_is_forgotten() {
    let exports = [offer("a")];
    let context = context_bytes("a", &["base:allocation"]);
    let mut server = server(&exports, TlsPolicy::Optional);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    assert_eq!(kinds(&server.ask(opt::SET_META_CONTEXT, &context)), [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(server.send(opt::STARTTLS, &[]), Ok(Step::StartTls));
    server.replies(opt::STARTTLS);
    assert_eq!(kinds(&server.ask(opt::SET_META_CONTEXT, &context)), [rep::ERR_INVALID]);
    let terms = server.go("a").terms;
    assert_eq!((terms.replies, terms.allocation), (ReplyStyle::Simple, None));

    let mut server = self::server(&exports, TlsPolicy::Optional);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    server.ask(opt::SET_META_CONTEXT, &context);
    server.send(opt::STARTTLS, &[]).unwrap();
    server.replies(opt::STARTTLS);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    assert_eq!(server.go("a").terms.allocation, None, "a context was selected in plain text");
}

#[test]
fn what_comes_with_the_wish_for_tls_ends_the_connection() {
    let exports = [offer("a")];
    let mut server = server(&exports, TlsPolicy::Optional);
    let mut input = option_bytes(opt::STARTTLS, &[]);
    input.extend_from_slice(&option_bytes(opt::LIST, &[]));
    let ended = server.handshake.step(&mut input.freeze(), server.offers, &mut server.output);
    assert_eq!(ended, Err(Violation::PlainAfterStartTls));
    assert!(server.output.is_empty());
}

fn wish() -> Wish {
    Wish { export: "a".to_owned(), replies: ReplyStyle::Structured, allocation: Allocation::Wanted }
}

/// A client that wants TLS and has asked for it.
fn client() -> (Negotiation, BytesMut) {
    let (mut client, mut output) = (Negotiation::new(wish()).with_tls(), BytesMut::new());
    let mut greeting = BytesMut::new();
    let _ = Handshake::new(&mut greeting);
    assert_eq!(client.step(&mut greeting, &mut output), Ok(None));
    let asked = [&3_u32.to_be_bytes()[..], &option_bytes(opt::STARTTLS, &[])].concat();
    assert_eq!(output.split(), asked, "nothing comes before it");
    (client, output)
}

fn answer(reply: u32, data: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    super::super::option::put_reply(&mut bytes, opt::STARTTLS, reply, &[data]);
    bytes
}

#[test]
fn a_client_says_nothing_more_until_tls_reached() {
    let (mut client, mut output) = client();
    assert!(!client.awaits_tls());
    assert_eq!(client.step(&mut answer(rep::ACK, &[]), &mut output), Ok(None));
    for _ in 0..2 {
        assert!(client.awaits_tls());
        assert!(output.is_empty());
        assert_eq!(client.step(&mut BytesMut::new(), &mut output), Ok(None));
    }
    client.tls_reached(&mut output);
    assert!(!client.awaits_tls());
    assert_eq!(output, option_bytes(opt::STRUCTURED_REPLY, &[]));
}

#[test]
fn a_client_that_wants_tls_never_goes_on_without() {
    for (reply, data, message) in [
        (rep::ERR_POLICY, &b"not here"[..], "not here"),
        (rep::ERR_UNSUP, b"", ""),
        (rep::ERR_TLS_REQD, b"odd", "odd"),
    ] {
        let (mut client, mut output) = client();
        let refused = Err(NegotiationError::TlsRefused { message: message.to_owned() });
        assert_eq!(client.step(&mut answer(reply, data), &mut output), refused);
        assert_eq!(output, option_bytes(opt::ABORT, &[]));
        let after = Err(NegotiationError::Violation(Violation::AfterEnd));
        assert_eq!(client.step(&mut BytesMut::from(&b"x"[..]), &mut output), after);
    }
    // A server whose greeting has no options.
    let mut greeting = BytesMut::new();
    greeting.put_u64(INIT_PASSWD);
    greeting.put_u64(OPTION_MAGIC);
    greeting.put_u16(0);
    let mut output = BytesMut::new();
    let ended = Negotiation::new(wish()).with_tls().step(&mut greeting, &mut output);
    assert!(matches!(ended, Err(NegotiationError::TlsRefused { .. })), "{ended:?}");
    assert!(output.is_empty());
}

#[test]
fn plain_text_behind_the_servers_consent_is_refused() {
    let (mut client, mut output) = client();
    let mut input = answer(rep::ACK, &[]);
    input.extend_from_slice(&answer(rep::ACK, &[]));
    let ended = client.step(&mut input, &mut output);
    assert_eq!(ended, Err(NegotiationError::Violation(Violation::PlainAfterStartTls)));
}

#[test]
fn a_client_without_tls_is_told_what_the_server_wants() {
    let exports = [offer("a")];
    let (mut to_client, mut to_server) = (BytesMut::new(), BytesMut::new());
    let mut server = Handshake::new(&mut to_client).with_tls(TlsPolicy::Required);
    let mut client = Negotiation::new(wish());
    let offers = Offers { exports: &exports, shutting_down: false };
    let ended = loop {
        match client.step(&mut to_client, &mut to_server) {
            Ok(_) => {}
            Err(error) => break error,
        }
        let mut received = to_server.split().freeze();
        while !received.is_empty() {
            assert_eq!(server.step(&mut received, offers, &mut to_client), Ok(Step::Answered));
        }
    };
    assert_eq!(ended, NegotiationError::TlsRequired);
}

#[test]
fn both_sides_agree_with_tls() {
    let exports = [offer("a")];
    let (mut to_client, mut to_server) = (BytesMut::new(), BytesMut::new());
    let mut server = Handshake::new(&mut to_client).with_tls(TlsPolicy::Required);
    let mut client = Negotiation::new(wish()).with_tls();
    let offers = Offers { exports: &exports, shutting_down: false };
    let mut agreed = None;
    loop {
        if let Some(found) = client.step(&mut to_client, &mut to_server).unwrap() {
            assert_eq!(Some(found.terms), agreed);
            return;
        }
        if client.awaits_tls() {
            client.tls_reached(&mut to_server);
        }
        let mut received = to_server.split().freeze();
        while !received.is_empty() {
            if let Step::Agreed(now) = server.step(&mut received, offers, &mut to_client).unwrap() {
                agreed = Some(now.terms);
            }
        }
    }
}
