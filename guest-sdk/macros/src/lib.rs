//! The `#[operator]` attribute: finds an operator's declared state and exports its component.

use proc_macro::TokenStream;
use quote::{format_ident, quote};
use syn::{Error, Fields, ItemStruct, LitStr, parse_macro_input};

/// Makes a struct an operator.
///
/// Fields marked `#[state]` become declared state under the field's name, or under another one:
/// `#[state(name = "totals")]`. State of an earlier version under another name is taken over with
/// `#[state(renamed_from = "sums")]`. On `wasm32` the struct becomes the component's export, so a crate
/// has at most one operator; elsewhere the attribute exports nothing, and unit tests run natively.
#[proc_macro_attribute]
pub fn operator(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let item = parse_macro_input!(item as ItemStruct);
    if !arguments.is_empty() {
        let message = "#[operator] takes no arguments";
        return Error::new_spanned(&item.ident, message).to_compile_error().into();
    }
    expand(item).unwrap_or_else(Error::into_compile_error).into()
}

fn expand(mut item: ItemStruct) -> syn::Result<proc_macro2::TokenStream> {
    let mut states = Vec::new();
    if let Fields::Named(fields) = &mut item.fields {
        for field in &mut fields.named {
            let Some(place) = field.attrs.iter().position(|a| a.path().is_ident("state")) else {
                continue;
            };
            let attribute = field.attrs.remove(place);
            let Some(ident) = field.ident.clone() else { continue };
            let (name, renamed_from) = state_name(&attribute, &ident.to_string())?;
            let is_cfg = |attribute: &&syn::Attribute| attribute.path().is_ident("cfg");
            let cfgs: Vec<syn::Attribute> = field.attrs.iter().filter(is_cfg).cloned().collect();
            states.push((name, renamed_from, ident, cfgs));
        }
    }
    if !item.generics.params.is_empty() {
        let message = "an operator is one concrete type: it cannot have generic parameters";
        return Err(Error::new_spanned(&item.generics, message));
    }
    let name = &item.ident;
    let named = states.iter().map(|(name, renamed_from, field, cfgs)| {
        let renamed_from = match renamed_from {
            Some(before) => quote!(::core::option::Option::Some(#before)),
            None => quote!(::core::option::Option::None),
        };
        // A field that is not compiled is no state.
        quote!(#(#cfgs)* {
            states.push(::cofferdam_sdk::state::NamedState {
                name: #name,
                renamed_from: #renamed_from,
                field: &mut self.#field,
            });
        })
    });
    let export = export(&item);
    Ok(quote! {
        #item

        impl ::cofferdam_sdk::state::DeclaredState for #name {
            #[allow(unused_mut, clippy::vec_init_then_push)]
            fn states(&mut self) -> ::std::vec::Vec<::cofferdam_sdk::state::NamedState<'_>> {
                let mut states = ::std::vec::Vec::new();
                #(#named)*
                states
            }
        }

        #export
    })
}

/// The name of a state, and one that it had before.
fn state_name(attribute: &syn::Attribute, field: &str) -> syn::Result<(String, Option<String>)> {
    let (mut name, mut renamed_from) = (field.to_owned(), None);
    if matches!(attribute.meta, syn::Meta::Path(_)) {
        return Ok((name, renamed_from));
    }
    attribute.parse_nested_meta(|meta| {
        if meta.path.is_ident("name") {
            name = meta.value()?.parse::<LitStr>()?.value();
        } else if meta.path.is_ident("renamed_from") {
            renamed_from = Some(meta.value()?.parse::<LitStr>()?.value());
        } else {
            return Err(meta.error("expected `name = \"...\"` or `renamed_from = \"...\"`"));
        }
        Ok(())
    })?;
    Ok((name, renamed_from))
}

fn export(item: &ItemStruct) -> proc_macro2::TokenStream {
    let operator = &item.ident;
    let name = operator.to_string();
    let component = format_ident!("{}Component", operator);
    quote! {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            use ::cofferdam_sdk::{bindings, runtime::Task};
            use bindings::cofferdam::operator::types::*;

            struct #component;

            ::std::thread_local! {
                static TASK: ::std::cell::RefCell<Task<#operator>> = Default::default();
            }

            impl bindings::exports::cofferdam::operator::guest::Guest for #component {
                fn describe() -> Description {
                    Task::<#operator>::describe(#name)
                }
                fn open(context: OpenContext) -> ::core::result::Result<(), OperatorError> {
                    TASK.with_borrow_mut(|task| task.open(context))
                }
                fn process(input: u32, records: Batch) -> ::core::result::Result<Processed, OperatorError> {
                    TASK.with_borrow_mut(|task| task.process(input, &records))
                }
                fn advance(watermark: i64) -> ::core::result::Result<Vec<Emission>, OperatorError> {
                    TASK.with_borrow_mut(|task| task.advance(watermark))
                }
                fn checkpoint(request: CheckpointRequest) -> ::core::result::Result<HandedOver, OperatorError> {
                    Ok(TASK.with_borrow_mut(|task| task.checkpoint(request)))
                }
                fn restore(
                    changes: StateChanges,
                    schemas: Vec<(u32, String)>,
                ) -> ::core::result::Result<(), OperatorError> {
                    TASK.with_borrow_mut(|task| task.restore(&changes, &schemas))
                }
                fn converts(state: u32, schema: String) -> ::core::result::Result<(), String> {
                    TASK.with_borrow_mut(|task| task.converts(state, &schema))
                }
                fn finish() -> ::core::result::Result<Vec<Emission>, OperatorError> {
                    TASK.with_borrow_mut(|task| task.finish())
                }
                fn close() {
                    TASK.with_borrow_mut(|task| *task = Default::default());
                }
            }

            bindings::export!(#component with_types_in ::cofferdam_sdk::bindings);
        };
    }
}
