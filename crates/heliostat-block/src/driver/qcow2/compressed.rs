//! Decompressing a cluster.
//!
//! The output is never longer than a cluster, whatever the input says: a bomb is cut off and refused.

use std::io::Read;

use super::error::Corruption;
use super::header::Compression;

/// Decompresses one cluster of `cluster_size` bytes from the start of `data`; what follows it is ignored. It was found
/// at `offset`.
///
/// # Errors
/// [`Corruption::Compressed`] when there is no whole cluster in it.
pub(crate) fn decompress(
    data: &[u8],
    compression: Compression,
    cluster_size: usize,
    offset: u64,
) -> Result<Vec<u8>, Corruption> {
    let damaged = Corruption::Compressed { offset };
    let mut cluster = vec![0; cluster_size];
    let written = match compression {
        Compression::Deflate => libdeflater::Decompressor::new()
            .deflate_decompress(data, &mut cluster)
            .map_err(|_| damaged.clone())?,
        Compression::Zstd => {
            let frame = zstd::stream::read::Decoder::with_buffer(data).map_err(|_| damaged.clone())?;
            let mut frame = frame.single_frame();
            frame.read_exact(&mut cluster).map_err(|_| damaged.clone())?;
            cluster_size
        }
    };
    if written == cluster_size { Ok(cluster) } else { Err(damaged) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 64 << 10;

    fn cluster() -> Vec<u8> {
        (0..SIZE).map(|at| u8::try_from(at / 64 % 251).unwrap()).collect()
    }

    fn compress(data: &[u8], compression: Compression) -> Vec<u8> {
        match compression {
            Compression::Deflate => {
                let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
                let mut out = vec![0; compressor.deflate_compress_bound(data.len())];
                let len = compressor.deflate_compress(data, &mut out).unwrap();
                out.truncate(len);
                out
            }
            Compression::Zstd => zstd::bulk::compress(data, 1).unwrap(),
        }
    }

    #[test]
    fn both_kinds_come_back_with_other_data_behind_them() {
        for compression in [Compression::Deflate, Compression::Zstd] {
            let mut data = compress(&cluster(), compression);
            data.extend_from_slice(&[0xaa; 700]);
            assert_eq!(decompress(&data, compression, SIZE, 0), Ok(cluster()));
        }
    }

    #[test]
    fn what_is_cut_short_or_too_long_or_nonsense_is_a_corruption() {
        for compression in [Compression::Deflate, Compression::Zstd] {
            let data = compress(&cluster(), compression);
            let cut = &data[..data.len() / 2];
            let short = compress(&cluster()[..SIZE / 2], compression);
            for bad in [cut, &short, &[0xff; 512], &[]] {
                let refused = decompress(bad, compression, SIZE, 7);
                assert_eq!(refused, Err(Corruption::Compressed { offset: 7 }));
            }
        }
        let bomb = compress(&vec![0; 16 << 20], Compression::Deflate);
        assert!(decompress(&bomb, Compression::Deflate, SIZE, 0).is_err());
    }
}
