use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use domain::ModelCard;
use mesh::{Channel, MAX_MESSAGE_BYTES, Mesh, Target};
use proto::v1;
use proto::v1::images_client::ImagesClient;
use proto::v1::language_client::LanguageClient;
use proto::v1::tokenizer_client::TokenizerClient;
use proto::v1::vision_client::VisionClient;
use tokio::time::Instant;

use crate::error::Error;
use crate::stages::Calls;

/// How long a card is trusted: instances may be replaced by ones with another checkpoint.
const FRESH: Duration = Duration::from_secs(30);

/// The models of the configuration.
pub(crate) struct Models {
    mesh: Mesh,
    models: BTreeMap<String, Arc<Model>>,
}

/// One model: the way to its stages, and what it can do.
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) tokenizer: TokenizerClient<Channel>,
    pub(crate) vision: VisionClient<Channel>,
    pub(crate) language: LanguageClient<Channel>,
    pub(crate) images: ImagesClient<Channel>,
    /// With the time until which it is trusted.
    card: RwLock<Option<(Arc<ModelCard>, Instant)>>,
}

impl Models {
    pub(crate) fn new(mesh: &Mesh, names: &[String]) -> Self {
        let models = names.iter().map(|name| (name.clone(), Arc::new(Model::new(mesh, name)))).collect();
        Self { mesh: mesh.clone(), models }
    }

    /// The model of that name; the only one when the name is empty.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<Model>, Error> {
        let only = || self.models.values().next().filter(|_| name.is_empty() && self.models.len() == 1);
        self.models
            .get(name)
            .or_else(only)
            .cloned()
            .ok_or_else(|| Error::UnknownModel { name: name.to_owned(), known: self.models.keys().cloned().collect::<Vec<_>>().join(", ") })
    }

    /// All models as clients see them. One that nobody serves is listed as not ready, with what is known of it.
    pub(crate) async fn list(&self, calls: &Calls) -> Vec<v1::Model> {
        futures::future::join_all(self.models.values().map(|model| self.entry(model, calls))).await
    }

    async fn entry(&self, model: &Model, calls: &Calls) -> v1::Model {
        let card = model.card(calls).await.ok();
        let ready = match &card {
            Some(card) => self.ready(model, card).await,
            None => false,
        };
        let card = card.or_else(|| model.last_card());
        v1::Model {
            name: model.name.clone(),
            family: card.as_ref().map(|card| card.family.clone()).unwrap_or_default(),
            context_length: card.as_ref().map_or(0, |card| card.context_length as u32),
            text_output: true,
            image_input: card.as_ref().is_some_and(|card| card.tokens_per_image.is_some()),
            image_output: card.as_ref().is_some_and(|card| card.canvas.is_some()),
            ready,
        }
    }

    async fn ready(&self, model: &Model, card: &ModelCard) -> bool {
        let needed =
            [("language", true), ("tokenizer", true), ("vision", card.tokens_per_image.is_some()), ("images", card.canvas.is_some())];
        for (service, _) in needed.iter().filter(|(_, needed)| *needed) {
            if !self.mesh.is_served(&Target::new(*service, &model.name)).await {
                return false;
            }
        }
        true
    }
}

impl Model {
    fn new(mesh: &Mesh, name: &str) -> Self {
        let channel = |service: &str| mesh.channel(&Target::new(service, name));
        macro_rules! client {
            ($client:ident, $service:literal) => {
                $client::new(channel($service)).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
            };
        }
        Self {
            name: name.to_owned(),
            tokenizer: client!(TokenizerClient, "tokenizer"),
            vision: client!(VisionClient, "vision"),
            language: client!(LanguageClient, "language"),
            images: client!(ImagesClient, "images"),
            card: RwLock::default(),
        }
    }

    /// What the model can do, asked of an instance when it is not known or no longer fresh.
    pub(crate) async fn card(&self, calls: &Calls) -> Result<Arc<ModelCard>, Error> {
        if let Some(card) = self.fresh_card() {
            return Ok(card);
        }
        let card = Arc::new(calls.describe(self).await?);
        *self.card.write().unwrap_or_else(PoisonError::into_inner) = Some((card.clone(), Instant::now() + FRESH));
        Ok(card)
    }

    /// An instance is gone, and another may be different: ask again before the next request.
    pub(crate) fn forget_card(&self) {
        if let Some((_, trusted_until)) = self.card.write().unwrap_or_else(PoisonError::into_inner).as_mut() {
            *trusted_until = Instant::now();
        }
    }

    fn fresh_card(&self) -> Option<Arc<ModelCard>> {
        let known = self.card.read().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().filter(|(_, trusted_until)| Instant::now() < *trusted_until).map(|(card, _)| card.clone())
    }

    fn last_card(&self) -> Option<Arc<ModelCard>> {
        self.card.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(card, _)| card.clone())
    }
}
