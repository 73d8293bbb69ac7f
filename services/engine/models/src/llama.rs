//! DeepSeek LLM (`model_type: llama`): the decoder that every text side of the family shares (spec: language.md 1).
//!
//! The families with experts or latent attention have other blocks in the same decoder; their configuration says which (`deepseek.rs`,
//! `deepseek_v2.rs`).

use std::sync::Arc;

use checkpoint::Checkpoint;
use domain::ModelCard;
use layers::{
    Attention, Backend, EngineError, Head, LanguageModel, LatentAttention, Limits, Linear, Losses, Moe, Observer, RemoteExperts, RmsNorm,
    Rotation, RowInput, Slice, Step, StepOutput, SwiGlu, Weights, observe,
};

use crate::text_config::{AttentionConfig, TextConfig};

/// A text model.
pub(crate) struct Llama<B: Backend> {
    card: ModelCard,
    limits: Limits,
    decoder: Decoder<B>,
}

impl<B: Backend> Llama<B> {
    /// The tensors are `model.*` and `lm_head.weight`. With `remote`, routed experts are not among them.
    pub fn load(
        backend: &Arc<B>,
        checkpoint: &Checkpoint,
        config: TextConfig,
        card: ModelCard,
        kv_blocks: usize,
        remote: Option<&Arc<dyn RemoteExperts>>,
    ) -> Result<Self, EngineError> {
        let weights = Weights::new(checkpoint);
        let decoder = Decoder::load_around(backend, config, &weights.at("model"), &weights, kv_blocks, remote)?;
        Ok(Self::around(card, decoder))
    }

    /// A model whose decoder lies elsewhere in its checkpoint.
    pub fn around(card: ModelCard, decoder: Decoder<B>) -> Self {
        Self { card, limits: decoder.limits(None), decoder }
    }
}

impl<B: Backend> LanguageModel for Llama<B> {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn kv_block_bytes(&self) -> usize {
        self.decoder.kv_block_bytes()
    }

    fn kv_blocks(&self) -> usize {
        self.limits.kv_blocks
    }

    fn forward(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<StepOutput, EngineError> {
        step.check(&self.limits)?;
        let no_codes = |_: &[u32]| Err(EngineError::Step("a VQ code, but the model has no generation embedding".into()));
        let x = self.decoder.embed(&step.rows, no_codes)?; // [rows, hidden]
        let mut losses = Losses::of(&step.slices);
        let x = self.decoder.forward(x, &step.slices, &mut losses, observer)?; // [rows, hidden]
        let mut output = StepOutput::empty(step);
        output.count_losses(step, &losses);
        self.decoder.text_head(&x, step, observer, &mut output)?;
        Ok(output)
    }
}

/// Embedding, layers, last norm and text head, with the KV cache.
pub(crate) struct Decoder<B: Backend> {
    pub backend: Arc<B>,
    pub config: TextConfig,
    embed_tokens: Linear<B>,
    layers: Vec<Layer<B>>,
    norm: RmsNorm<B>,
    /// `None`: the embedding table serves as head.
    lm_head: Option<Linear<B>>,
    /// One per layer.
    kv: Vec<B::Kv>,
    kv_blocks: usize,
}

impl<B: Backend> Decoder<B> {
    /// `weights` holds `embed_tokens`, `layers` and `norm`; `head` holds `lm_head`.
    pub fn load(
        backend: &Arc<B>,
        config: TextConfig,
        weights: &Weights<'_>,
        head: &Weights<'_>,
        kv_blocks: usize,
    ) -> Result<Self, EngineError> {
        Self::load_around(backend, config, weights, head, kv_blocks, None)
    }

    /// As [`Decoder::load`], with routed experts that are somewhere else.
    pub fn load_around(
        backend: &Arc<B>,
        config: TextConfig,
        weights: &Weights<'_>,
        head: &Weights<'_>,
        kv_blocks: usize,
        remote: Option<&Arc<dyn RemoteExperts>>,
    ) -> Result<Self, EngineError> {
        let table = [config.vocab_size, config.hidden_size];
        let layers = (0..config.num_hidden_layers).map(|i| Layer::load(backend, weights, &config, i, remote)).collect::<Result<_, _>>()?;
        // Some multimodal exports say that the tables are tied although they hold a head of their own: what is in the file counts.
        let tied = config.tie_word_embeddings && !head.contains("lm_head.weight");
        let lm_head = (!tied).then(|| Linear::load(backend, head, "lm_head", table, false)).transpose()?;
        let shape = config.kv_shape(kv_blocks);
        Ok(Self {
            backend: backend.clone(),
            embed_tokens: Linear::load(backend, weights, "embed_tokens", table, false)?,
            layers,
            norm: RmsNorm::load(backend, weights, "norm", config.hidden_size, config.rms_norm_eps)?,
            lm_head,
            kv: (0..config.num_hidden_layers).map(|_| backend.kv(&shape)).collect::<Result<_, _>>()?,
            kv_blocks,
            config,
        })
    }

    /// What a step may hold, with a codebook of `codebook` entries.
    pub fn limits(&self, codebook: Option<usize>) -> Limits {
        Limits {
            vocabulary: self.config.vocab_size,
            codebook,
            hidden: self.config.hidden_size,
            context: self.config.max_position_embeddings,
            kv_blocks: self.kv_blocks,
        }
    }

    pub fn kv_block_bytes(&self) -> usize {
        self.config.kv_block_bytes()
    }

    /// The inputs of layer 0, `[rows, hidden]`; `embed_codes` turns VQ codes into such rows.
    pub fn embed(
        &self,
        rows: &[RowInput],
        embed_codes: impl FnOnce(&[u32]) -> Result<B::Tensor, EngineError>,
    ) -> Result<B::Tensor, EngineError> {
        let width = self.config.hidden_size;
        let (mut tokens, mut codes, mut given) = (Placed::default(), Placed::default(), Placed::default());
        for (index, row) in rows.iter().enumerate() {
            match row {
                RowInput::Token(id) => tokens.push(index, &[*id]),
                RowInput::Code(code) => codes.push(index, &[*code]),
                RowInput::Embedding { values, row } => given.push(index, &values[row * width..(row + 1) * width]),
            }
        }
        if tokens.rows.len() == rows.len() {
            return self.embed_tokens.embed(&tokens.values);
        }
        let mut x = self.backend.upload(vec![0.0; rows.len() * width], width)?;
        if !tokens.rows.is_empty() {
            x = self.backend.scatter(x, &tokens.rows, &self.embed_tokens.embed(&tokens.values)?)?;
        }
        if !codes.rows.is_empty() {
            x = self.backend.scatter(x, &codes.rows, &embed_codes(&codes.values)?)?;
        }
        if !given.rows.is_empty() {
            x = self.backend.scatter(x, &given.rows, &self.backend.upload(given.values, width)?)?;
        }
        Ok(x)
    }

    /// All layers: `x` `[rows, hidden]` -> `[rows, hidden]`, before the last norm.
    pub fn forward(
        &mut self,
        x: B::Tensor,
        slices: &[Slice],
        losses: &mut Losses,
        observer: &mut dyn Observer,
    ) -> Result<B::Tensor, EngineError> {
        let width = self.config.hidden_size;
        let rotation = self.config.rope.rotation(self.backend.as_ref(), slices)?; // [rows, head_dim / 2]
        observe(self.backend.as_ref(), observer, "hidden.embed", &x, width)?;
        let mut x = x;
        for (i, (layer, kv)) in self.layers.iter().zip(&mut self.kv).enumerate() {
            x = layer.forward(x, &Positions { slices, rotation: &rotation }, kv, losses, observer)?; // [rows, hidden]
            observe(self.backend.as_ref(), observer, &format!("hidden.layer{i}"), &x, width)?;
        }
        Ok(x)
    }

    /// Logits of the slices that want text, and the hidden states of those that want them; an observer sees the last norm and the logits of
    /// all rows.
    pub fn text_head(&self, x: &B::Tensor, step: &Step, observer: &mut dyn Observer, output: &mut StepOutput) -> Result<(), EngineError> {
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        if observer.active() {
            let h = self.norm.forward(x)?; // [rows, hidden]
            observe(self.backend.as_ref(), observer, "hidden.final_norm", &h, self.config.hidden_size)?;
            observe(self.backend.as_ref(), observer, "logits", &head.forward(&h)?, self.config.vocab_size)?;
        }
        self.hidden(x, step, output)?;
        self.head(Head::Text, x, step, self.config.vocab_size, |h| head.forward(&h), output)
    }

    /// The normed rows of the slices that want hidden states.
    fn hidden(&self, x: &B::Tensor, step: &Step, output: &mut StepOutput) -> Result<(), EngineError> {
        let rows = step.rows_wanting_hidden();
        if rows.is_empty() {
            return Ok(());
        }
        let h = self.norm.forward(&self.backend.gather(x, &rows)?)?; // [rows wanting hidden, hidden]
        output.fill_hidden(step, &self.backend.download(&h)?, self.config.hidden_size)
    }

    /// Logits `[rows wanting head, width]` of `apply` over the normed rows.
    pub fn head(
        &self,
        head: Head,
        x: &B::Tensor,
        step: &Step,
        width: usize,
        apply: impl FnOnce(B::Tensor) -> Result<B::Tensor, EngineError>,
        output: &mut StepOutput,
    ) -> Result<(), EngineError> {
        let rows = step.rows_wanting(head);
        if rows.is_empty() {
            return Ok(());
        }
        let h = self.norm.forward(&self.backend.gather(x, &rows)?)?; // [rows wanting head, hidden]
        let logits = apply(h)?; // [rows wanting head, width]
        output.fill(step, head, &self.backend.download(&logits)?, width)
    }
}

/// Rows of a step of one kind, and what stands in them.
struct Placed<T> {
    rows: Vec<usize>,
    values: Vec<T>,
}

impl<T> Default for Placed<T> {
    fn default() -> Self {
        Self { rows: Vec::new(), values: Vec::new() }
    }
}

impl<T: Copy> Placed<T> {
    fn push(&mut self, row: usize, values: &[T]) {
        self.rows.push(row);
        self.values.extend_from_slice(values);
    }
}

/// Where the rows of a step stand.
struct Positions<'a, B: Backend> {
    slices: &'a [Slice],
    rotation: &'a Rotation<B::Tensor>,
}

/// `h = h + attention(norm(h))`, `h = h + mlp(norm(h))`.
struct Layer<B: Backend> {
    backend: Arc<B>,
    index: usize,
    input_layernorm: RmsNorm<B>,
    self_attn: SelfAttention<B>,
    post_attention_layernorm: RmsNorm<B>,
    mlp: FeedForward<B>,
}

enum SelfAttention<B: Backend> {
    Heads(Attention<B>),
    Latent(Box<LatentAttention<B>>),
}

enum FeedForward<B: Backend> {
    Dense(SwiGlu<B>),
    Experts(Box<Moe<B>>),
}

impl<B: Backend> Layer<B> {
    /// Layer `index` of those in `weights`.
    fn load(
        backend: &Arc<B>,
        weights: &Weights<'_>,
        config: &TextConfig,
        index: usize,
        remote: Option<&Arc<dyn RemoteExperts>>,
    ) -> Result<Self, EngineError> {
        let weights = weights.at("layers").at(index);
        let norm = |name| RmsNorm::load(backend, &weights, name, config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            backend: backend.clone(),
            index,
            input_layernorm: norm("input_layernorm")?,
            self_attn: SelfAttention::load(backend, &weights.at("self_attn"), config)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: FeedForward::load(backend, &weights.at("mlp"), config, index, remote)?,
        })
    }

    /// `x` `[rows, hidden]` -> `[rows, hidden]`
    fn forward(
        &self,
        x: B::Tensor,
        positions: &Positions<'_, B>,
        kv: &mut B::Kv,
        losses: &mut Losses,
        observer: &mut dyn Observer,
    ) -> Result<B::Tensor, EngineError> {
        let h = self.self_attn.forward(&self.input_layernorm.forward(&x)?, positions, kv)?; // [rows, hidden]
        let x = self.backend.add(x, &h)?;
        let h = self.post_attention_layernorm.forward(&x)?; // [rows, hidden]
        let h = match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(&h)?,
            FeedForward::Experts(experts) => experts.forward(&h, self.index, losses, observer)?,
        };
        self.backend.add(x, &h)
    }
}

impl<B: Backend> SelfAttention<B> {
    fn load(backend: &Arc<B>, weights: &Weights<'_>, config: &TextConfig) -> Result<Self, EngineError> {
        Ok(match config.attention {
            AttentionConfig::Heads(shape) => Self::Heads(Attention::load(backend, weights, shape)?),
            AttentionConfig::Latent(shape) => Self::Latent(Box::new(LatentAttention::load(backend, weights, shape)?)),
        })
    }

    /// `x` `[rows, hidden]` -> `[rows, hidden]`
    fn forward(&self, x: &B::Tensor, positions: &Positions<'_, B>, kv: &mut B::Kv) -> Result<B::Tensor, EngineError> {
        let Positions { slices, rotation } = positions;
        match self {
            Self::Heads(attention) => attention.forward(x, slices, rotation, kv),
            Self::Latent(attention) => attention.forward(x, slices, rotation, kv),
        }
    }
}

impl<B: Backend> FeedForward<B> {
    fn load(
        backend: &Arc<B>,
        weights: &Weights<'_>,
        config: &TextConfig,
        layer: usize,
        remote: Option<&Arc<dyn RemoteExperts>>,
    ) -> Result<Self, EngineError> {
        Ok(match config.experts_of(layer) {
            None => Self::Dense(SwiGlu::load(backend, weights, config.hidden_size, config.intermediate_size, config.mlp_bias)?),
            Some(shape) => Self::Experts(Box::new(Moe::load(backend, weights, shape, layer, remote)?)),
        })
    }
}
