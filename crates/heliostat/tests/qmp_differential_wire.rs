//! The raw wire, ours and `qemu-storage-daemon`'s side by side: bytes go in, and what comes out is compared line by
//! line. Tokens, numbers at their limits, texts in and out of UTF-8, brackets that do not match, envelopes.
//!
//! Not compared, because it is meant to differ: numbers too large for any kind of number come back from QEMU as `inf`,
//! which is no JSON; of several unknown members QEMU names the one that its hash table has first; after a message
//! nested too deep QEMU refuses each bracket that follows, and we the rest of its line.

mod common;
mod qmp;

use common::wait::LIMIT;
use qmp::Peer;
use qmp::wire::Wire;

/// Behind every input; what is said up to its answer is what is compared.
const MARKER: &str = "\n{'execute':'query-jobs','id':'MARKER'}\n";

/// What one says to `input`.
fn said(peer: &Peer, hello: &str, input: &[u8]) -> Vec<String> {
    let mut wire = Wire::connect(&peer.socket());
    assert!(wire.next()["QMP"].is_object());
    wire.send(hello.as_bytes());
    wire.send(&[input, MARKER.as_bytes()].concat());
    let mut said = Vec::new();
    while said.last().is_none_or(|line: &String| !line.contains("MARKER")) {
        said.push(wire.line(LIMIT).expect("the marker is answered in the end"));
    }
    said
}

const PLAIN: &str = "{'execute':'qmp_capabilities'}";
const WITH_OOB: &str = "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}";

/// Compares what both say to each of `inputs`, on connections that began with each of `hellos`.
fn compare(hellos: &[&str], inputs: impl IntoIterator<Item = Vec<u8>>) {
    let Some(qemu) = Peer::qemu() else { return };
    let ours = Peer::ours();
    let mut wrong = Vec::new();
    for input in inputs {
        for hello in hellos {
            let [theirs, ours] = [&qemu, &ours].map(|peer| said(peer, hello, &input));
            if ours != theirs {
                let input = String::from_utf8_lossy(&input);
                wrong.push(format!("to {input:?} after {hello:?}\n  qemu: {theirs:?}\n  ours: {ours:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn texts(inputs: &[&str]) -> Vec<Vec<u8>> {
    inputs.iter().map(|input| input.as_bytes().to_vec()).collect()
}

const NUMBERS: &[&str] = &[
    "0",
    "-0",
    "1",
    "-1",
    "00",
    "01",
    "-",
    "--1",
    "+1",
    "1.",
    ".5",
    "1.0",
    "-0.0",
    "1e3",
    "1E3",
    "1e+3",
    "1e-3",
    "1e",
    "0e0",
    "1.e5",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "-9223372036854775809",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999999",
    "4294967295",
    "4294967296",
    "0x10",
    "1_000",
    "NaN",
    "Infinity",
    "-Infinity",
    "true",
    "\"5\"",
    "null",
    "[]",
    "{}",
    "1.5",
    "0.1",
    "1e-400",
    "1e16",
    "1e17",
    "123456789012345678901234567890.5",
    "3.14159265358979",
    "123456.789",
    "3.5e-7",
    "1true",
    "1-2",
    "1.5.5",
    "1e5x",
];

#[test]
fn numbers_are_taken_up_to_the_same_limits() {
    let places = [
        "{'execute':'query-jobs','id':N}",
        "{'execute':'blockdev-mirror','arguments':{'job-id':'j','device':'d','target':'t','sync':'full','speed':N}}",
        "{'execute':'blockdev-mirror','arguments':{'job-id':'j','device':'d','target':'t','sync':'full','granularity':N}}",
        "{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'1','latency-ns':N}}",
        "{'execute':'nbd-server-start','arguments':{'max-connections':N,'addr':{'type':'unix'}}}",
        "N",
        "[N]",
    ];
    let inputs = places.iter().flat_map(|place| NUMBERS.iter().map(|number| place.replace('N', number)));
    compare(&[PLAIN], inputs.map(String::into_bytes));
}

#[test]
fn texts_are_taken_and_given_back_alike() {
    let texts: [&[u8]; 47] = [
        b"\"a\"",
        b"'a'",
        b"''",
        br#""\u0000""#,
        br#""a\u0000b""#,
        br#""\ud800""#,
        br#""\udc00""#,
        br#""\ud83d\ude00""#,
        br#""\ud83d\u0041""#,
        br#""\uD83D\uDE00""#,
        br#""\ud83d\ufffe""#,
        br#""\/\b\f\n\r\t\\""#,
        br#""\a""#,
        br#""\0""#,
        br#""\'""#,
        br#"'\"'"#,
        br#""\u00""#,
        br#"'\u12'"#,
        br#""\uzzzz""#,
        br#""\u\u12ab""#,
        b"\"\x7f\"",
        b"'\xc3\xa9'",
        b"'\xe2\x82\xac'",
        b"'\xf0\x9f\x98\x80'",
        br#""\ufffe""#,
        br#""\uFFFF""#,
        br#""\ufdd0""#,
        br#""\u2028""#,
        b"'%'",
        b"'%d'",
        b"%d",
        b"%",
        b"'\xff'",
        b"'\xfe'",
        b"'\x80'",
        b"'\xc3\x28'",
        b"'\xed\xa0\x80'",
        b"'\xc0\x80'",
        b"'\xc1\x80'",
        b"'\xf4\x90\x80\x80'",
        b"'\xf8\x80\x80\x80'",
        b"'\xef\xbf\xbf'",
        b"'\xef\xbf\xbd'",
        b"'\xef\xb7\x90'",
        b"'\xf0\x9f\xbf\xbf'",
        b"'a\x01b'",
        b"\xc3\xa9",
    ];
    let inputs = texts.iter().flat_map(|text| {
        [[b"{'execute':'query-jobs','id':", *text, b"}"].concat(), [b"{'execute':", *text, b"}"].concat()]
    });
    compare(&[PLAIN], inputs.collect::<Vec<_>>());
    compare(&[PLAIN], ["a".repeat(1000), format!("'{}\u{1}", "a".repeat(1000))].map(String::into_bytes));
}

const NO_JSON_BYTES: &[&[u8]] = &[
    b"\x00{'execute':'query-jobs'}",
    b"\x01",
    b"\x01true",
    b"\x0b{'execute':'query-jobs'}",
    b"{'execute':\x01'query-jobs'}",
    b";\x01true",
    b";\xfetrue",
    b";\x7ftrue",
    b"\xff",
    b"\xfe",
    b"\xef\xbb\xbf{'execute':'query-jobs'}",
    b"{'execute':'query-jobs'\xff}",
    b"{\xe2\x82\xac}",
    b"'abc\x01' ",
];

const NO_JSON: &[&str] = &[
    "[]",
    "1 2",
    "'a' 'b'",
    "null",
    "tru",
    "truE",
    "TRUE",
    "true1",
    "true false",
    "nul",
    "a_b",
    "a-b",
    "}",
    "{}}",
    "}{}",
    "{,}",
    "{'a'}",
    "{'a':}",
    "{'a':1,,}",
    "[,]",
    "[1,]",
    "{'a'::1}",
    "{:}",
    "1,2",
    "{'a':1}{'a':2}",
    "{ 'a' : 1 }",
    "{'a':1]",
    "{'a':1]}",
    "[}",
    "[}]",
    "{]",
    "{]}",
    "[[[]]]]]",
    "{{{}}}",
    "[1,2}",
    "[[1}]",
    "{'a':{]}",
    "{'execute':['a'}]",
    "   ",
    "\t\t",
    "/* */{}",
    "// x",
    "#",
    "(",
    "@",
    "`",
    "\\",
    "\"",
    "'",
    "-",
    "-a",
    ";true",
    "; true\n true",
    ";\ttrue",
    ";\rtrue",
    ";'a'",
    ";\"}\"",
    "{;{'execute':'query-jobs'}}",
    "{execute:'query-jobs'}",
    "{'execute':'query-jobs';}",
    "{'execute':'query-jobs'} x",
    "x {'execute':'query-jobs'}",
    "{'a':'b",
    "'a\\",
    "%i true",
    "\"abc\n true",
    "\r\n\r\n{'execute':'query-jobs'}\r\n",
    "{\r\n'execute'\r\n:\r\n'query-jobs'\r\n}",
    "{'a\tb':1}",
];

#[test]
fn what_is_no_json_is_answered_and_passed_over_alike() {
    let bytes = NO_JSON_BYTES.iter().map(|bytes| bytes.to_vec());
    compare(&["", PLAIN], texts(NO_JSON).into_iter().chain(bytes));
}

#[test]
fn envelopes_are_opened_alike() {
    compare(
        &["", PLAIN, WITH_OOB],
        texts(&[
            "{'execute':'query-jobs','arguments':{}}",
            "{'execute':'query-jobs','arguments':[]}",
            "{'execute':'query-jobs','arguments':{'a':1}}",
            "{'execute':'job-pause'}",
            "{'execute':'job-pause','arguments':{'id':null}}",
            "{'execute':'job-pause','arguments':{'id':'x','id':'y'}}",
            "{'execute':'job-pause','arguments':{'id':'x','zz':1}}",
            "{'execute':'job-pause','execute':'job-resume'}",
            "{'execute':'query-jobs','id':1,'id':2}",
            "{'id':1,'execute':'query-jobs'}",
            "{'arguments':{},'id':1,'execute':'query-jobs'}",
            "{'id':7}",
            "{'id':7,'foo':1}",
            "{'foo':1,'id':7,'execute':'query-jobs'}",
            "{'execute':'query-jobs','exec-oob':'query-jobs'}",
            "{'exec-oob':'query-jobs','execute':5}",
            "{'execute':'query-jobs','exec-oob':5}",
            "{'id':1,'exec-oob':'zork','execute':'x'}",
            "{'exec-oob':5}",
            "{'exec-oob':'zork','id':3}",
            "{'exec-oob':'quit','id':1}",
            "{'exec-oob':'qmp_capabilities'}",
            "{'exec-oob':'query-jobs','arguments':5}",
            "{'execute':''}",
            "{'execute':'Query-jobs'}",
            "{'execute':'query-jobs '}",
            "{'execute':'\u{e9}'}",
            "{'execute':'query-jobs','\\u00e9':1}",
        ]),
    );
}

#[test]
fn arguments_are_checked_in_the_same_order_and_refused_in_the_same_words() {
    compare(
        &[PLAIN],
        texts(&[
            "{'execute':'block-export-add','arguments':{'type':'nbd','id':'e'}}",
            "{'execute':'block-export-add','arguments':{'type':'zork','id':'e'}}",
            "{'execute':'block-export-add','arguments':{'id':'e'}}",
            "{'execute':'block-export-add','arguments':{'id':5,'type':'nbd','node-name':7}}",
            "{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'n','cache':{'direct':5}}}",
            "{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'n','cache':{'zz':true}}}",
            "{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'n','cache':true}}",
            "{'execute':'blockdev-add','arguments':{'driver':null}}",
            "{'execute':'blockdev-add','arguments':{}}",
            "{'execute':'blockdev-add','arguments':{'zz':1}}",
            "{'execute':'nbd-server-start','arguments':{'addr':{'type':'inet','data':{'host':'h'}}}}",
            "{'execute':'nbd-server-start','arguments':{'addr':{'type':'unix'}}}",
            "{'execute':'nbd-server-start','arguments':{'addr':{'type':'unix','data':{'path':'x','y':1}}}}",
            "{'execute':'nbd-server-start','arguments':{'addr':{'type':'unix','data':{'path':'x'},'q':1}}}",
            "{'execute':'query-named-block-nodes','arguments':{'flat':1}}",
            "{'execute':'query-named-block-nodes','arguments':{'flat':null}}",
            "{'execute':'block-job-set-speed','arguments':{'device':'j','speed':1e3}}",
            "{'execute':'qmp_capabilities','arguments':{'enable':[]}}",
        ]),
    );
}
