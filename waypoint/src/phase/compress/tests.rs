use super::*;
use futures_util::FutureExt as _;
use http_body_util::StreamBody;
use std::io::Read as _;
use tokio::sync::mpsc;

const CODINGS: [Coding; 3] = [Coding::Gzip, Coding::Brotli, Coding::Zstd];

fn unpack(coding: Coding, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match coding {
        Coding::Gzip => _ = flate2::read::GzDecoder::new(data).read_to_end(&mut out),
        Coding::Brotli => _ = brotli::Decompressor::new(data, 4096).read_to_end(&mut out),
        Coding::Zstd => _ = zstd::stream::read::Decoder::new(data).expect("a decoder").read_to_end(&mut out),
    }
    out
}
type Frames = mpsc::UnboundedSender<Frame<Bytes>>;
/// A body whose frames come when they are sent.
fn body(coding: Coding) -> (Frames, Compressed) {
    let (tx, mut rx) = mpsc::unbounded_channel();
    let frames = futures_util::stream::poll_fn(move |cx| rx.poll_recv(cx).map(|f| f.map(Ok::<_, BodyError>)));
    let inner = Body::Boxed(StreamBody::new(frames).boxed_unsync());
    (tx, Compressed::new(inner, Encoder::new(coding).expect("an encoder")))
}
fn text(n: usize) -> Bytes {
    "a line of a text that repeats itself\n".repeat(n).into()
}

#[test]
fn what_goes_in_comes_out() {
    for coding in CODINGS {
        let (tx, compressed) = body(coding);
        let whole = text(10_000);
        for piece in whole.chunks(50_000) {
            tx.send(Frame::data(Bytes::copy_from_slice(piece))).expect("open");
        }
        drop(tx);
        let got = compressed.collect().now_or_never().expect("all is there").expect("whole").to_bytes();
        assert!(got.len() * 5 < whole.len(), "{coding:?}: {} of {}", got.len(), whole.len());
        assert_eq!(unpack(coding, &got), whole, "{coding:?}");
    }
}
#[test]
fn what_is_there_is_handed_on_before_the_rest_comes() {
    for coding in CODINGS {
        let (tx, mut compressed) = body(coding);
        tx.send(Frame::data(Bytes::from_static(b"an event"))).expect("open");
        let mut got = Vec::new();
        while let Some(Some(Ok(frame))) = compressed.frame().now_or_never() {
            got.extend_from_slice(&frame.into_data().expect("data"));
        }
        assert_eq!(unpack(coding, &got), b"an event", "{coding:?}");
        assert!(!compressed.is_end_stream());
    }
}
#[test]
fn pieces_are_small_whatever_comes() {
    for coding in CODINGS {
        let (tx, mut compressed) = body(coding);
        // Cannot be compressed.
        let noise: Vec<u8> = std::iter::repeat_with(rand::random).take(1 << 20).collect();
        tx.send(Frame::data(noise.clone().into())).expect("open");
        drop(tx);
        let (mut got, mut largest) = (Vec::new(), 0);
        while let Some(frame) = compressed.frame().now_or_never().expect("all is there") {
            let data = frame.expect("whole").into_data().expect("data");
            largest = largest.max(data.len());
            got.extend_from_slice(&data);
        }
        assert!(largest <= 512 << 10, "{coding:?}: {largest}");
        assert_eq!(unpack(coding, &got), noise, "{coding:?}");
    }
}
#[test]
fn trailers_and_errors_come_through() {
    let (tx, compressed) = body(Coding::Gzip);
    tx.send(Frame::data(Bytes::from_static(b"x"))).expect("open");
    tx.send(Frame::trailers(HeaderMap::from_iter([(header::ETAG, "a".parse().expect("a value"))]))).expect("open");
    let all = compressed.collect().now_or_never().expect("all is there").expect("whole");
    assert_eq!(all.trailers().map(HeaderMap::len), Some(1));
    assert_eq!(unpack(Coding::Gzip, &all.to_bytes()), b"x");

    let broken = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"x"))), Err(BodyError::Gone("gone"))]);
    let inner = Body::Boxed(StreamBody::new(broken).boxed_unsync());
    let compressed = Compressed::new(inner, Encoder::new(Coding::Zstd).expect("an encoder"));
    assert!(compressed.collect().now_or_never().expect("all is there").is_err());
}
