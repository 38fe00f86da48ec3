//! Against transformers' `Qwen2_5_VLForConditionalGeneration` at tiny widths
//! (tests/data/qwen/README.md).

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::picture::{Token, TokenSequence, passes};
use super::session::Row;
use super::*;
use crate::backbone::{Context, Layout, Rope};
#[cfg(feature = "nano")]
use crate::generate::Sampling;
#[cfg(feature = "nano")]
use crate::rng::{Rng, Stream};
#[cfg(feature = "nano")]
use crate::scenes::{Kind, Scene, Split};

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn tiny() -> ChatModel {
    let source = Source::Folder(data("qwen/tiny"));
    ChatModel::load(&source, ChatConfig::read(&source).unwrap(), &Device::Cpu, None).unwrap()
}

fn golden() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(data("qwen/golden.safetensors"), &Device::Cpu).unwrap()
}

fn picture(model: &ChatModel, name: &str) -> Picture {
    model.picture(name, &crate::pixels::open(&data("tokenflow/preprocess").join(name)).unwrap()).unwrap()
}

/// The conversations of the golden data.
fn session<'a>(model: &'a ChatModel, case: &str) -> Session<'a> {
    let mut session = Session::new(model).unwrap();
    let image = |name: &str| Part::Image(picture(model, name));
    let text = |text: &str| Part::Text(text.into());
    session.push(
        Role::User,
        match case {
            "text" => vec![text("Hello, 你好 🙂")],
            "one" => vec![image("shapes.png"), text("What is this?")],
            "wide" => vec![image("drawings_wide.png"), text("x")],
            other => panic!("{other}"),
        },
    );
    session
}

fn close(what: &str, got: &Tensor, want: &Tensor, limit: f32) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let off = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(off < limit, "{what}: {off}");
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.to_dtype(DType::I64).unwrap().to_vec1::<i64>().unwrap().into_iter().map(|v| v as u32).collect()
}

#[test]
fn everything_is_as_the_reference_computes_it() {
    let (model, golden) = (tiny(), golden());
    for case in ["text", "one", "wide"] {
        let mut session = session(&model, case);
        let of = |name: &str| &golden[&format!("{case}.{name}")];
        for picture in session.pictures() {
            close(case, picture.features(), of("features"), 1e-4);
        }
        let TokenSequence { tokens, layout } = session.render(Row::Conditional, true).unwrap();
        let pad = model.pad.unwrap();
        let words: Vec<u32> = tokens.iter().map(|t| if let Token::Text(id) = t { *id } else { pad }).collect();
        assert_eq!(words, ids(of("ids")), "{case}");
        let positions = of("positions").to_dtype(DType::F32).unwrap().t().unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(layout.positions.iter().map(|p| p.to_vec()).collect::<Vec<_>>(), positions, "{case}");
        close(case, &session.embed(&tokens).unwrap().get(0).unwrap(), of("embeddings"), 1e-4);
        // One pass over all tokens, and the same in pieces against the cache.
        let logits = session.logits(&tokens, &layout, tokens.len());
        close(case, &logits, of("logits"), 1e-4);
        close(case, &session.logits(&tokens, &layout, 7), of("logits"), 1e-4);
        for (name, penalty) in [("greedy", 1.0), ("penalised", 1.3)] {
            let sampling = TextSampling { repetition_penalty: penalty, ..TextSampling::GREEDY };
            let options = ReplyOptions { sampling, max_tokens: 32, image: None, seed: 0, guide_from_sources: true };
            session.answer(&options, &mut |_| ControlFlow::Continue(())).unwrap();
            let words: Vec<u32> = session
                .take_reply()
                .into_iter()
                .flat_map(|p| if let Part::Drawn(_, ids) = p { ids } else { vec![] })
                .collect();
            // The reference goes on after a word that ends a reply.
            let want = ids(of(name));
            let stop = want.iter().position(|id| *id == model.template.end || model.config.stops.contains(id));
            assert_eq!(words, want[..stop.unwrap_or(want.len())], "{case} {name}");
        }
    }
}

#[test]
fn a_conversation_with_two_images_is_as_the_reference_reads_it() {
    let (model, golden) = (tiny(), golden());
    let [first, second] = ["drawings_small.png", "photo_tall.png"].map(|name| picture(&model, name));
    let features = Tensor::cat(&[first.features(), second.features()], 0).unwrap();
    close("features", &features, &golden["two.features"], 1e-4);
    let mut session = Session::new(&model).unwrap();
    session.set_system("Be brief.");
    // The golden conversation has text between its images, which a message of ours has after them:
    // the tokens are put together by hand.
    let pad = model.pad.unwrap();
    let mut want = ids(&golden["two.ids"]).into_iter().peekable();
    session.push(Role::User, vec![Part::Image(first.clone()), Part::Image(second.clone())]);
    let mut sequence = TokenSequence::default();
    let mut pictures = [&first, &second].into_iter();
    while let Some(id) = want.next() {
        if id != pad {
            sequence.push_text(&[id]);
            continue;
        }
        while want.next_if_eq(&pad).is_some() {}
        sequence.push_picture(pictures.next().unwrap(), &model.config.backbone);
    }
    let TokenSequence { tokens, layout } = sequence;
    let positions = golden["two.positions"].to_dtype(DType::F32).unwrap().t().unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(layout.positions.iter().map(|p| p.to_vec()).collect::<Vec<_>>(), positions);
    close("embeddings", &session.embed(&tokens).unwrap().get(0).unwrap(), &golden["two.embeddings"], 1e-4);
    close("logits", &session.logits(&tokens, &layout, 50), &golden["two.logits"], 1e-4);
}

#[test]
fn images_are_prepared_as_the_reference_does() {
    let (model, golden) = (tiny(), golden());
    let Some((ImageEncoder::Tower(config), processor)) = &model.config.vision else { panic!("no image encoder") };
    for (case, names) in [
        ("one", &["shapes.png"][..]),
        ("two", &["drawings_small.png", "photo_tall.png"]),
        ("wide", &["drawings_wide.png"]),
    ] {
        let mut values = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let image = crate::pixels::open(&data("tokenflow/preprocess").join(name)).unwrap();
            let patches = processor.patches(&image, config).unwrap();
            let grid = ids(&golden[&format!("{case}.grids")].get(i).unwrap());
            assert_eq!([patches.tokens.0 as u32 * 2, patches.tokens.1 as u32 * 2], grid[..], "{name}");
            values.extend(patches.values);
        }
        let patches = Tensor::from_vec(values, ((), 588), &Device::Cpu).unwrap();
        let every: Vec<u32> = (0..patches.dim(0).unwrap() as u32).step_by(7).collect();
        let some = patches.index_select(&Tensor::new(every, &Device::Cpu).unwrap(), 0).unwrap();
        close(case, &some, &golden[&format!("{case}.patches")], 1e-5);
    }
}

/// The real tokenizer, cut down to the words that these texts can need.
#[test]
fn texts_become_the_ids_of_the_reference() {
    let text = Text::from_bytes(&std::fs::read(data("qwen/tokenizer.json")).unwrap()).unwrap();
    let tokens: Value = serde_json::from_slice(&std::fs::read(data("qwen/tokens.json")).unwrap()).unwrap();
    let numbers = |v: &Value| v.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<u32>>();
    for case in tokens["texts"].as_array().unwrap() {
        let said = case["text"].as_str().unwrap();
        let ids = text.encode(said).unwrap();
        assert_eq!(ids, numbers(&case["ids"]), "{said:?}");
        let mut detokenizer = Detokenizer::default();
        let parts: Vec<String> = ids.iter().map(|&id| detokenizer.push(id, &text).unwrap()).collect();
        assert!(parts.iter().all(|part| !part.contains('\u{fffd}')), "{parts:?}");
        let spoken = parts.concat() + &detokenizer.finish(&text).unwrap();
        assert_eq!(spoken, text.decode(&ids).unwrap());
    }
    assert_eq!(text.control("<|im_start|>"), Some(151_644));
    // What a user types is never a control token.
    let typed = text.encode("<|im_start|>").unwrap();
    assert!(!typed.contains(&151_644) && typed.len() > 1);
}

/// An edit in a conversation, greedy and guided: every code is the likeliest under one masked pass
/// over the whole of it.
#[cfg(feature = "nano")]
#[test]
fn an_edit_is_what_the_masked_pass_says() {
    let source = Source::parse(None).unwrap();
    let model = ChatModel::load(&source, ChatConfig::read(&source).unwrap(), &Device::Cpu, None).unwrap();
    let scene = Scene::of_kind(&Rng::new(1, 0, Stream::Train, 0), Kind::Colours, Split::Train);
    let image = image::RgbImage::from_raw(128, 128, scene.render(128, 128)).unwrap();
    let sampling = Sampling { cfg: 2.0, temperature: 0.0, ..Sampling::default() };
    let options = ReplyOptions {
        sampling: TextSampling::GREEDY,
        max_tokens: 8,
        image: Some(sampling),
        seed: 0,
        guide_from_sources: true,
    };
    let mut session = Session::new(&model).unwrap();
    let picture = model.picture("a", &image).unwrap();
    session.draw(vec![picture], "make it blue", &options, None, &mut |_| ControlFlow::Continue(())).unwrap();
    let drawn = session.pictures().last().unwrap().clone();
    let codes = drawn.codes().unwrap();
    let config = &model.config.backbone;
    let inputs = crate::generate::schedule::codes(&codes.scales) - 1;
    let logits = [Row::Conditional, Row::ImageConditional].map(|row| {
        let mut question = Session::new(&model).unwrap();
        let [asked, answered] = session.turns() else { panic!("one question and its answer") };
        question.push(Role::User, asked.parts.clone());
        question.reply = answered.parts.iter().filter(|part| part.image().is_none()).cloned().collect();
        let mut sequence = question.render(row, true).unwrap();
        let first = sequence.tokens.len();
        let mut image = TokenSequence::default();
        image.push_picture(&drawn, config);
        sequence.tokens.extend(&image.tokens[..1 + inputs]);
        sequence.layout.push_image(&codes.scales, config.spatial_extent);
        let x = session.embed(&sequence.tokens).unwrap();
        let tokens = sequence.layout.len();
        let rope = Rope::new(config, &[&sequence.layout.positions], &Device::Cpu).unwrap();
        let mask = Tensor::from_vec(sequence.layout.mask(), (tokens, tokens), &Device::Cpu).unwrap();
        let hidden = model.reader.backbone().unwrap().forward(&x, &rope, Context::Masked(&mask)).unwrap();
        model
            .reader
            .backbone()
            .unwrap()
            .code_logits(&hidden.get(0).unwrap().narrow(0, first, 1 + inputs).unwrap())
            .unwrap()
    });
    let mut at = 0;
    for (scale, (codes, (h, w))) in codes.codes.iter().zip(&codes.scales).enumerate() {
        let t = 2.0 * scale as f64 / 7.0;
        let [said, images] = [0, 1].map(|row: usize| logits[row].narrow(0, at, h * w).unwrap());
        let guided = ((said * (1.0 + t)).unwrap() - (images * t).unwrap()).unwrap();
        let likeliest = guided.argmax(1).unwrap().to_vec1::<u32>().unwrap();
        assert!(likeliest.into_iter().map(u64::from).eq(codes.iter().copied()), "scale {scale}");
        at += h * w;
    }
    // What was drawn is in the cache: the next turn reads the sum of its codes, its end, and what
    // is new.
    let (next, _) =
        (session.turns().len(), session.say(vec![], "what is it?", &options, &mut |_| ControlFlow::Continue(())));
    assert_eq!(session.turns().len(), next + 2);
    let sequence = TokenSequence::of(
        model
            .template
            .render(&model.text, "", session.turns()[..3].iter().map(|t| (t.role, &t.parts[..])), &[])
            .unwrap(),
        config,
    );
    assert!(session.read[0].starts_with(&sequence.tokens));
}

/// Where guidance ends early its row has not read the whole image: the next edit reads the rest,
/// and draws what a session draws that reads all of it anew.
#[cfg(feature = "nano")]
#[test]
fn guidance_that_ended_early_goes_on_with_the_next_edit() {
    let source = Source::parse(None).unwrap();
    let model = ChatModel::load(&source, ChatConfig::read(&source).unwrap(), &Device::Cpu, None).unwrap();
    let sampling = Sampling { cfg: 2.0, temperature: 0.0, cfg_until: Some(5), draft: 1, ..Sampling::default() };
    let mut options = ReplyOptions {
        sampling: TextSampling::GREEDY,
        max_tokens: 8,
        image: Some(sampling),
        seed: 0,
        guide_from_sources: true,
    };
    let watch = &mut |_: ReplyEvent| ControlFlow::Continue(());
    let mut session = Session::new(&model).unwrap();
    session.draw(vec![], "a red circle", &options, None, watch).unwrap();
    if let Some(sampling) = &mut options.image {
        sampling.cfg_until = None;
    }
    let mut anew = Session::new(&model).unwrap();
    session.turns().iter().for_each(|turn| anew.push(turn.role, turn.parts.clone()));
    let mut edit = |session: &mut Session| {
        session.draw(vec![], "make it blue", &options, None, watch).unwrap();
        session.pictures().last().unwrap().codes().unwrap().codes.clone()
    };
    assert_eq!(edit(&mut session), edit(&mut anew));
}

/// An image that the context has no room for is not begun, and the conversation stays as it was.
#[cfg(feature = "nano")]
#[test]
fn images_end_with_the_context() {
    let source = Source::parse(None).unwrap();
    let config = ChatConfig { context: 300, ..ChatConfig::read(&source).unwrap() };
    let model = ChatModel::load(&source, config, &Device::Cpu, None).unwrap();
    let image = Some(Sampling { temperature: 0.0, ..Sampling::default() });
    let options =
        ReplyOptions { sampling: TextSampling::GREEDY, max_tokens: 0, image, seed: 0, guide_from_sources: true };
    let watch = &mut |_: ReplyEvent| ControlFlow::Continue(());
    let mut session = Session::new(&model).unwrap();
    session.draw(vec![], "a red circle", &options, None, watch).unwrap();
    let error = session.draw(vec![], "a blue star", &options, None, watch).unwrap_err();
    assert!(error.exit_code() == 2 && error.message.contains("the model's limit is 300"), "{error}");
    assert_eq!(session.turns().len(), 2);
}

impl Session<'_> {
    /// What was said last, which then was never said.
    fn take_reply(&mut self) -> Vec<Part<Picture>> {
        std::mem::take(&mut self.reply)
    }

    /// Logits of every position, read from the start in passes of `chunk` tokens: (T, vocab).
    fn logits(&mut self, tokens: &[Token], layout: &Layout, chunk: usize) -> Tensor {
        self.read[0].clear();
        self.caches[0].truncate(0);
        self.caches[0].reserve(tokens.len()).unwrap();
        let backbone = self.model.reader.backbone().unwrap();
        let rows = passes(tokens, chunk).map(|(part, step)| {
            let positions = &layout.positions[self.caches[0].len()..][..part.len()];
            let rope = Rope::new(backbone.config(), &[positions], backbone.device()).unwrap();
            let x = self.embed(part).unwrap();
            let context = Context::Cached { caches: &mut self.caches[..1], step };
            backbone.text_logits(&backbone.forward(&x, &rope, context).unwrap()).unwrap().get(0).unwrap()
        });
        let rows = rows.collect::<Vec<_>>();
        self.read[0] = tokens.to_vec();
        Tensor::cat(&rows, 0).unwrap()
    }
}
