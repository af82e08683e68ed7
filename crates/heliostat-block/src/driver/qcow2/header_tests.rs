//! Headers as they are written, as they are read, and damaged.

use super::*;

fn header() -> Header {
    Header {
        layout: Layout { cluster_bits: 16, refcount_order: 4, extended_l2: false, version: 3 },
        size: 64 << 20,
        l1: Table { offset: 0x3_0000, len: 1 },
        refcount_table: Table { offset: 0x1_0000, len: 1 },
        snapshots: Table::default(),
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        compression: Compression::Deflate,
        backing_file: Some(b"base.qcow2".to_vec()),
        backing_format: Some(b"qcow2".to_vec()),
        data_file: None,
        bitmaps: None,
        further_fields: Vec::new(),
        further_extensions: Vec::new(),
    }
}

fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = header().encode().unwrap();
    bytes.resize(1 << 16, 0);
    change(&mut bytes);
    Header::decode(&bytes).unwrap_err().to_string()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn what_is_encoded_is_decoded_alike() {
    let full = Header {
        incompatible: incompatible::COMPRESSION | incompatible::EXTERNAL_DATA,
        autoclear: autoclear::BITMAPS,
        compression: Compression::Zstd,
        data_file: Some(b"data".to_vec()),
        bitmaps: Some(BitmapsExtension { count: 1, directory_offset: 0x5_0000, directory_size: 32 }),
        further_fields: vec![0, 0, 0, 0, 0, 0, 0, 7],
        further_extensions: vec![Extension { kind: 0x1234_5678, data: b"kept".to_vec() }],
        ..header()
    };
    let old = Header {
        layout: Layout { version: 2, cluster_bits: 9, ..header().layout },
        size: 32 << 10,
        backing_file: None,
        ..header()
    };
    for header in [header(), full, old] {
        assert_eq!(Header::decode(&header.encode().unwrap()).unwrap(), header);
    }
}

#[test]
fn damaged_headers_are_refused_with_the_texts_that_qemu_has() {
    let cases: [(&str, usize, &[u8]); 17] = [
        ("Image is not in qcow2 format", 0, &[0; 4]),
        ("Unsupported qcow2 version 4", 4, &[0, 0, 0, 4]),
        ("Unsupported cluster size: 2^22", 20, &[0, 0, 0, 22]),
        ("Image is too big", 24, &[0x80, 0, 0, 0]),
        ("L1 table is too small", 24, &[0, 0, 1, 0]),
        ("Unsupported encryption method 3", 32, &[0, 0, 0, 3]),
        ("Active L1 table too large", 36, &[1, 0, 0, 0]),
        ("Active L1 table offset invalid", 46, &[2, 0]),
        ("Reference count table offset invalid", 54, &[2, 0]),
        ("Image does not contain a reference count table", 56, &[0; 4]),
        ("Reference count table too large", 56, &[0, 0x10, 0, 0]),
        ("Snapshot table too large", 60, &[0, 2, 0, 0]),
        ("Unsupported qcow2 feature(s): Unknown incompatible feature: 20", 79, &[0x20]),
        ("qcow2: Compression type incompatible feature bit must not be set", 79, &[8]),
        ("data-file-raw requires a data file", 95, &[2]),
        ("Reference count entry width too large; may not exceed 64 bits", 96, &[0, 0, 0, 7]),
        ("qcow2 header too short", 100, &[0, 0, 0, 100]),
    ];
    for (text, at, value) in cases {
        assert_eq!(refusal(|bytes| put(bytes, at, value)), text);
    }
    assert_eq!(refusal(|bytes| put(bytes, 116, &[0x7f])), "Header extension too large");
    assert!(refusal(|bytes| put(bytes, 32, &[0, 0, 0, 2])).contains("LUKS"));
    assert_eq!(refusal(|bytes| bytes.truncate(60)), "qcow2 header too short");
}

#[test]
fn a_feature_that_is_not_known_is_called_as_the_image_calls_it() {
    let mut table = vec![0, 63];
    table.extend_from_slice(b"quantum clusters");
    table.resize(48, 0);
    let mut header = header();
    header.layout.cluster_bits = 11;
    header.l1.offset = 0x1000;
    header.size = 1 << 10;
    header.further_extensions = vec![Extension { kind: extension::FEATURE_NAMES, data: table }];
    let mut bytes = header.encode().unwrap();
    put(&mut bytes, 72, &[0x80]);
    let refusal = Header::decode(&bytes).unwrap_err().to_string();
    assert_eq!(refusal, "Unsupported qcow2 feature(s): quantum clusters");
}

#[test]
fn a_name_that_does_not_fit_is_refused() {
    let mut long = header();
    long.layout.cluster_bits = 9;
    long.backing_file = Some(vec![b'x'; 500]);
    assert!(matches!(long.encode(), Err(FormatError::Invalid(_))));
}

#[test]
fn any_bytes_are_answered() {
    let good = header().encode().unwrap();
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let _ = Header::decode(&bytes);
            let _ = Header::decode(&bytes[..at]);
        }
    }
}
